package byokgate

import (
	"context"
	"errors"
	"maps"
	"slices"
)

// For a change of secrets: decide for the workspace with the change, tell whether a refusal is about the change, and let a tenant delete a
// key.

// Overlay is a lookup of the stored secrets with changes applied: the workspace after they are saved. A change that is nil is a deletion.
// Names that a change covers are not looked up. If stored is nil, all other names are unreadable, not absent: without a store, use
// [Static].
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

// Concerns says whether an error of [Client.Decide] is about the secrets of these names. If a workspace is refused for another reason (its
// model was withdrawn, or a key of another name is dead), the change does no harm and may be saved. An undecided request may be about any
// name.
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
		// Several may be involved: what could not be read, or who owns the model.
		return about(details.RelevantEnv)
	}
	return false
}

// MayDelete says whether to allow a deletion of secrets: after is the error of the decision without them (see [Overlay]), before is that of
// the current workspace, both at [Update]. It is false only if the deletion takes a working key from a workspace that needs it. A dead or
// leaked key may always be deleted, and so may any secret while byok-gate is down. If the tenant insists, the platform may delete anyway:
// the workspace is then refused at its next start, and nobody else pays for it.
func MayDelete(after, before error, names ...string) bool {
	var denied *Denied
	if after == nil || !errors.As(after, &denied) || denied.Retryable() || !Concerns(after, names...) {
		return true
	}
	// The current workspace would not start either, because of these secrets: they are of no use to it.
	var dead *Denied
	return errors.As(before, &dead) && !dead.Retryable() && Concerns(before, names...)
}
