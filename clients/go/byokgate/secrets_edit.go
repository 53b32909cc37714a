package byokgate

import (
	"context"
	"errors"
	"maps"
	"slices"
)

// What a platform needs around a change of secrets: to ask about the workspace as it would be, to tell whether a refusal is about the change,
// and not to keep a tenant from deleting a key.

// Overlay is a lookup in which changes stand over what is stored: the workspace as it would be after they are saved. A change that is nil
// is a deletion. Names that a change covers are not looked up. Where there is no stored lookup, the rest is unreadable, and not absent: without
// a store, there is [Static].
func Overlay(stored Lookup, scope Scope, changes map[string]*Secret) Lookup {
	changes = maps.Clone(changes)
	return func(ctx context.Context, in Scope, names []string) (Found, error) {
		if in != scope {
			return look(ctx, stored, in, names)
		}
		found := Found{}
		open := slices.DeleteFunc(slices.Clone(names), func(name string) bool {
			secret, changed := changes[name]
			if changed && secret != nil {
				found[name] = *secret
			}
			return changed
		})
		if len(open) == 0 {
			return found, nil
		}
		kept, err := look(ctx, stored, in, open)
		if err != nil {
			return nil, err
		}
		for _, name := range open {
			if secret, exists := kept[name]; exists {
				found[name] = secret
			}
		}
		return found, nil
	}
}

var errNoStored = errors.New("Overlay has no lookup for what is stored")

func look(ctx context.Context, stored Lookup, scope Scope, names []string) (Found, error) {
	if stored == nil {
		return nil, errNoStored
	}
	return stored(ctx, scope, names)
}

// Concerns says whether an error of [Client.Decide] has to do with the secrets of these names. A workspace that is refused for another reason
// (its model was withdrawn, say, or a key of another name is dead) is not made worse by a change of theirs, which may then be saved. What was
// not decided may have to do with any.
func Concerns(err error, names ...string) bool {
	if err == nil {
		return false
	}
	var denied *Denied
	if !errors.As(err, &denied) || denied == nil {
		return true
	}
	details := denied.Details()
	about := func(list []string) bool {
		return slices.ContainsFunc(names, func(name string) bool { return slices.Contains(list, name) })
	}
	switch {
	case about(denied.Body().MissingEnv), about([]string{details.CredentialEnv}):
		return true
	case denied.Retryable(), denied.Code() == AmbiguousProvider:
		// Several may have taken part: what could not be read, or who owns the model.
		return about(details.RelevantEnv)
	}
	return false
}

// MayDelete says whether a deletion of secrets is to be let through: after is the error of deciding about the workspace without them (see
// [Overlay]), before of deciding about it as it is, both at [Update]. Only a deletion that takes a working key from a workspace which needs it
// is held up; a dead or leaked key may always be deleted, and no secret is kept because byok-gate is away. A platform whose tenant insists may
// delete even so: the workspace is then refused at its next start, and nobody else pays for it.
func MayDelete(after, before error, names ...string) bool {
	var denied *Denied
	if after == nil || !errors.As(after, &denied) || denied.Retryable() || !Concerns(after, names...) {
		return true
	}
	// As it is, it would not start either, and that for these secrets: they are of no use to it.
	var dead *Denied
	return errors.As(before, &dead) && !dead.Retryable() && Concerns(before, names...)
}
