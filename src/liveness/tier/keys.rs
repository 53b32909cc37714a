//! Names and encryption of the values in the shared tier. A reader of the store learns no credential and no verdict, and a writer cannot forge
//! one. "To seal" here is to encrypt and authenticate.

use std::num::NonZeroU32;

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce, UnboundKey},
    hmac,
};

use crate::{
    domain::secret::with_stack_wiped,
    liveness::{new_keys::KeyLimit, provider_limits::StartLimit},
};

/// The prefix of all names, with the version of the layout.
const PREFIX: &str = "bg1:";
/// The same in a cluster. Between the braces is what its slot is determined by, so that all names are in one.
pub(super) const ONE_SLOT: &str = "bg1:{tier}";
/// The channel of notices.
pub(super) const CHANNEL: &str = "bg1:news";
/// Values are padded to this many bytes before they are sealed, so that the length reveals nothing.
pub(super) const PLAIN_BYTES: usize = 1024;
/// The bytes of a sealed value.
pub(super) const SEALED_BYTES: usize = NONCE_LEN + PLAIN_BYTES + MAX_TAG_LEN;
/// How many first bytes of a sealed value, its nonce, tell it from every other.
pub(super) const BEGINNING: usize = NONCE_LEN;
/// The bytes of a notice: the id of the observation, and whether it is a refusal.
const NOTICE_BYTES: usize = 33;
/// A shorter key could be guessed. 32 hexadecimal digits have 128 bits.
const MIN_KEY_CHARACTERS: usize = 32;

/// The keys of the tier: one key, or two during a rotation. The first is used to write, and both to read.
pub struct TierKeys {
    keys: Vec<TierKey>,
    prefix: &'static str,
}

struct TierKey {
    names: hmac::Key,
    seals: hmac::Key,
}

/// Identifies an observation, under one key.
pub(crate) type ObservationId = [u8; 32];

/// A credential as the tier identifies it.
pub(crate) struct CredentialIdentity<'a> {
    /// The identity of the endpoint, which covers how its responses are classified.
    pub(crate) endpoint: &'a [u8; 32],
    /// How the workspace's client sends the credential.
    pub(crate) client: [u8; 2],
    /// The credential.
    pub(crate) value: &'a str,
    /// The model.
    pub(crate) model: Model<'a>,
}

/// A limit of new credentials, and the name of its count in the store.
#[derive(Debug, Clone)]
pub(crate) struct Allowance {
    pub(super) limit: KeyLimit,
    pub(super) name: String,
    pub(super) per_minute: NonZeroU32,
}

/// The limit of starts at a provider, and the name of its count in the store.
#[derive(Debug, Clone)]
pub(crate) struct Starts {
    pub(super) name: String,
    pub(super) limit: StartLimit,
}

/// Which observations are about the model alone.
#[derive(Clone, Copy)]
pub(crate) enum Model<'a> {
    /// All of them: the model is part of every name.
    Always(&'a str),
    /// Some of them. They have a second name, with the model.
    Sometimes(&'a str),
}

/// The names of one credential's values under one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    /// The lease of the replica that probes.
    pub(super) lease: String,
    /// The observation of the credential and, under a second name, of the credential with one model.
    pub(super) observations: Vec<Name>,
    /// The credential's retry time, while the provider's starts are used up.
    pub(super) turn: String,
    /// The open breaker of the endpoint. All credentials share it.
    pub(super) breaker: Name,
}

/// The name of one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    pub(super) id: ObservationId,
    pub(super) text: String,
}

/// The message about an observation that was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) id: ObservationId,
    pub(super) refused: bool,
}

// === impl TierKeys ===

impl TierKeys {
    /// The keys of a file: one a line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if !(1..=2).contains(&lines.len()) {
            return Err(format!("holds {} lines; write one key, or two while one follows the other", lines.len()));
        }
        for (index, line) in lines.iter().enumerate() {
            if line.len() < MIN_KEY_CHARACTERS || line.contains(char::is_whitespace) {
                let number = index + 1;
                return Err(format!(
                    "key {number} is shorter than {MIN_KEY_CHARACTERS} characters, or holds a blank; make one with `openssl rand -hex 32`"
                ));
            }
        }
        if lines.len() == 2 && lines.first() == lines.last() {
            return Err("holds the same key twice".to_owned());
        }
        Ok(Self { keys: lines.into_iter().map(TierKey::of).collect(), prefix: PREFIX })
    }

    /// The same keys with names for a cluster.
    pub(super) fn in_one_slot(self) -> Self {
        Self { prefix: ONE_SLOT, ..self }
    }

    /// Under each key, the one that writes first.
    pub(super) fn names(&self, credential: &CredentialIdentity<'_>) -> Vec<Names> {
        with_stack_wiped(|| self.keys.iter().map(|key| key.names(credential, self.prefix)).collect())
    }

    /// What is counted of an organization or a platform, under the key that writes.
    pub(super) fn allowance(&self, limit: KeyLimit, of: &str, per_minute: NonZeroU32) -> Option<Allowance> {
        let purpose: &[u8] = match limit {
            KeyLimit::Organization => b"organization",
            KeyLimit::Platform => b"platform",
        };
        let id = self.keys.first()?.id(purpose, &[of.as_bytes()]);
        Some(Allowance { limit, name: format!("{}{}:new-keys", self.prefix, hex(&id)), per_minute })
    }

    /// The starts at a provider, under the key that writes.
    pub(super) fn starts(&self, provider: &str, limit: StartLimit) -> Option<Starts> {
        let id = self.keys.first()?.id(b"provider", &[provider.as_bytes()]);
        Some(Starts { name: format!("{}{}:starts", self.prefix, hex(&id)), limit })
    }

    /// Seals a value with the first key. `None` if the value is too long or the encryption fails.
    pub(super) fn seal(&self, name: &Name, plain: &[u8]) -> Option<Vec<u8>> {
        let mut padded = vec![b' '; PLAIN_BYTES];
        padded.get_mut(..plain.len())?.copy_from_slice(plain);
        self.keys.first()?.seal(name.text.as_bytes(), padded)
    }

    /// Opens a value that was sealed under this name with the key at this position.
    pub(super) fn open(&self, position: usize, name: &Name, sealed: &[u8]) -> Option<Vec<u8>> {
        self.keys.get(position)?.open(name.text.as_bytes(), sealed)
    }

    /// Seals a notice with the first key.
    pub(super) fn seal_notice(&self, notice: Notice) -> Option<Vec<u8>> {
        let mut plain = notice.id.to_vec();
        plain.push(u8::from(notice.refused));
        self.keys.first()?.seal(CHANNEL.as_bytes(), plain)
    }

    /// Opens a notice, with any key.
    pub(super) fn open_notice(&self, sealed: &[u8]) -> Option<Notice> {
        let plain = self.keys.iter().find_map(|key| key.open(CHANNEL.as_bytes(), sealed))?;
        let (id, refused) = plain.split_first_chunk::<32>().filter(|_| plain.len() == NOTICE_BYTES)?;
        Some(Notice { id: *id, refused: refused == [1] })
    }
}

impl std::fmt::Debug for TierKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TierKeys({})", self.keys.len())
    }
}

// === impl TierKey ===

impl TierKey {
    fn of(line: &str) -> Self {
        let derived = |purpose| hmac::Key::new(hmac::HMAC_SHA256, &blake3::derive_key(purpose, line.as_bytes()));
        with_stack_wiped(|| Self {
            names: derived("byok-gate shared tier v1: names of observations"),
            seals: derived("byok-gate shared tier v1: keys that seal observations"),
        })
    }

    fn names(&self, credential: &CredentialIdentity<'_>, prefix: &str) -> Names {
        let CredentialIdentity { endpoint, client, value, model } = credential;
        let credential = self.id(b"credential", &[*endpoint, client, value.as_bytes()]);
        let with_model = |model: &str| self.id(b"model", &[&credential, model.as_bytes()]);
        let ids = match model {
            Model::Always(model) => vec![with_model(model)],
            Model::Sometimes(model) => vec![credential, with_model(model)],
        };
        let texts: Vec<String> = ids.iter().map(|id| hex(id)).collect();
        let of_breaker = self.id(b"breaker", &[*endpoint]);
        let first = texts.first().cloned().unwrap_or_default();
        let observations = ids.into_iter().zip(texts);
        Names {
            lease: format!("{prefix}{first}:lease"),
            turn: format!("{prefix}{first}:turn"),
            observations: observations.map(|(id, text)| Name { id, text: format!("{prefix}{text}") }).collect(),
            breaker: Name { id: of_breaker, text: format!("{prefix}{}:breaker", hex(&of_breaker)) },
        }
    }

    /// All parts but the last have a fixed length for each purpose, so no separator is needed.
    fn id(&self, purpose: &[u8], parts: &[&[u8]]) -> ObservationId {
        let mut context = hmac::Context::with_key(&self.names);
        context.update(purpose);
        for part in parts {
            context.update(part);
        }
        let mut id = ObservationId::default();
        for (to, from) in id.iter_mut().zip(context.sign().as_ref()) {
            *to = *from;
        }
        id
    }

    /// Derives one key per name, so that no key comes near the limit of random nonces.
    fn sealing(&self, name: &[u8]) -> Option<LessSafeKey> {
        let key = hmac::sign(&self.seals, name);
        UnboundKey::new(&AES_256_GCM, key.as_ref()).ok().map(LessSafeKey::new)
    }

    fn seal(&self, name: &[u8], mut plain: Vec<u8>) -> Option<Vec<u8>> {
        let nonce: [u8; NONCE_LEN] = rand::random();
        self.sealing(name)?.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(name), &mut plain).ok()?;
        Some([&nonce[..], &plain].concat())
    }

    fn open(&self, name: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, body) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let mut body = body.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = self.sealing(name)?.open_in_place(nonce, Aad::from(name), &mut body).ok()?;
        Some(plain.to_vec())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const OLD: &str = "made-up-tier-key-0123456789abcdef0";
    const NEW: &str = "made-up-tier-key-fedcba98765432100";
    /// No name depends on it.
    const LIMIT: StartLimit = StartLimit {
        per_second: NonZeroU32::MIN,
        longest: Duration::ZERO,
        longest_for_new: Duration::ZERO,
        head_start: Duration::ZERO,
        queue_time: Duration::ZERO,
    };

    fn keys(text: &str) -> TierKeys {
        TierKeys::parse(text).unwrap()
    }

    fn credential<'a>(endpoint: &'a [u8; 32], value: &'a str, model: Model<'a>) -> CredentialIdentity<'a> {
        CredentialIdentity { endpoint, client: [1, 0], value, model }
    }

    #[test]
    fn a_key_file_holds_one_or_two_good_keys() {
        for good in [OLD.to_owned(), format!("\n {OLD}\n"), format!("{OLD}\r\n\r\n{NEW}\n")] {
            assert!(TierKeys::parse(&good).is_ok(), "{good:?}");
        }
        for (wrong, what) in [
            (String::new(), "holds 0 lines"),
            (format!("{OLD}\n{NEW}\n{OLD}x"), "holds 3 lines"),
            ("short".to_owned(), "key 1 is shorter than 32"),
            (format!("{OLD}\nshort"), "key 2 is shorter than 32"),
            (format!("{OLD} # old"), "holds a blank"),
            (format!("{OLD}\n{OLD}"), "the same key twice"),
        ] {
            let fault = TierKeys::parse(&wrong).unwrap_err();
            assert!(fault.contains(what) && !fault.contains("made-up"), "{wrong:?}: {fault}");
        }
    }

    #[test]
    fn every_part_of_a_name_counts_and_none_can_be_read() {
        let keys = keys(OLD);
        let name = |endpoint: &[u8; 32], client, value: &str, model: Model<'_>| {
            keys.names(&CredentialIdentity { endpoint, client, value, model }).remove(0)
        };
        let base = name(&[1; 32], [1, 0], "made-up-value", Model::Sometimes("m"));
        let others = [
            name(&[2; 32], [1, 0], "made-up-value", Model::Sometimes("m")),
            name(&[1; 32], [0, 1], "made-up-value", Model::Sometimes("m")),
            name(&[1; 32], [1, 0], "made-up-valuf", Model::Sometimes("m")),
            name(&[1; 32], [1, 0], "made-up-value", Model::Always("m")),
        ];
        for other in &others {
            assert_ne!(base.lease, other.lease);
            assert_ne!(base.observations[0], other.observations[0]);
        }
        for (other, is_same) in others.iter().zip([false, true, true, true]) {
            assert_eq!(base.breaker == other.breaker, is_same, "it is what is asked that has failed");
        }
        let other_model = name(&[1; 32], [1, 0], "made-up-value", Model::Sometimes("n"));
        assert_eq!((&base.lease, &base.observations[0]), (&other_model.lease, &other_model.observations[0]));
        assert_ne!(base.observations[1], other_model.observations[1]);
        assert_eq!(base, name(&[1; 32], [1, 0], "made-up-value", Model::Sometimes("m")), "equal on all replicas");
        let plain = [hex(blake3::hash(b"made-up-value").as_bytes()), "made-up".to_owned()];
        assert!(plain.iter().all(|plain| !format!("{base:?}").contains(plain)));
    }

    #[test]
    fn in_a_cluster_every_name_has_the_same_slot() {
        let names = |keys: &TierKeys| {
            let mut all = Vec::new();
            for names in keys.names(&credential(&[1; 32], "made-up", Model::Sometimes("m"))) {
                all.extend([names.lease, names.turn, names.breaker.text]);
                all.extend(names.observations.into_iter().map(|name| name.text));
            }
            all.push(keys.allowance(KeyLimit::Platform, "made-up", NonZeroU32::MIN).unwrap().name);
            all.push(keys.starts("made-up", LIMIT).unwrap().name);
            all
        };
        let both = format!("{NEW}\n{OLD}");
        let (alone, clustered) = (names(&keys(&both)), names(&keys(&both).in_one_slot()));
        assert_eq!(alone.len(), 12);
        // The hash of a slot is that of the text between the first braces. The rest is as without a cluster.
        for (alone, clustered) in alone.iter().zip(&clustered) {
            assert_eq!(Some(clustered.as_str()), alone.strip_prefix("bg1:").map(|rest| format!("bg1:{{tier}}{rest}")).as_deref());
        }
    }

    #[test]
    fn the_name_of_a_count_reveals_nothing() {
        let (old, both) = (keys(OLD), keys(&format!("{NEW}\n{OLD}")));
        type Counted = fn(&TierKeys, &str) -> String;
        let counts: [Counted; 3] = [
            |keys, of| keys.allowance(KeyLimit::Organization, of, NonZeroU32::MIN).unwrap().name,
            |keys, of| keys.allowance(KeyLimit::Platform, of, NonZeroU32::MIN).unwrap().name,
            |keys, of| keys.starts(of, LIMIT).unwrap().name,
        ];
        let names = counts.map(|name| {
            let one = name(&old, "made-up-name");
            assert_eq!(one, name(&old, "made-up-name"), "equal on all replicas");
            assert_ne!(one, name(&old, "made-up-namf"));
            assert_ne!(one, name(&both, "made-up-name"), "the first key writes");
            assert!(!one.contains("made-up") && !one.contains(&hex(blake3::hash(b"made-up-name").as_bytes())));
            one.split(':').nth(1).map(str::to_owned)
        });
        assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2], "{names:?}");
    }

    #[test]
    fn a_seal_opens_only_with_its_name_and_key_and_hides_the_value() {
        let (old, both) = (keys(OLD), keys(&format!("{NEW}\n{OLD}")));
        let of = |keys: &TierKeys, position: usize, value: &str| {
            keys.names(&credential(&[1; 32], value, Model::Sometimes("m")))[position].observations[0].clone()
        };
        let name = of(&old, 0, "made-up-1");
        let sealed = old.seal(&name, b"VALID").unwrap();
        assert_eq!(sealed.len(), SEALED_BYTES);
        assert_eq!(old.seal(&name, &[b'x'; PLAIN_BYTES]).unwrap().len(), SEALED_BYTES, "no length tells anything");
        assert_eq!(old.seal(&name, &[b'x'; PLAIN_BYTES + 1]), None);
        assert!(!sealed.windows(5).any(|part| part == b"VALID"));
        assert_ne!(sealed, old.seal(&name, b"VALID").unwrap(), "no two are equal");
        let opened = |keys: &TierKeys, position, name: &Name, sealed: &[u8]| {
            keys.open(position, name, sealed).map(|plain| String::from_utf8(plain).unwrap().trim_end().to_owned())
        };
        assert_eq!(opened(&old, 0, &name, &sealed).as_deref(), Some("VALID"));
        // With two keys, the second one's names and seals are still read.
        assert_eq!(of(&both, 1, "made-up-1"), name);
        assert_eq!(opened(&both, 1, &name, &sealed).as_deref(), Some("VALID"));
        assert_eq!(opened(&both, 0, &name, &sealed), None);
        assert_eq!(opened(&old, 0, &of(&old, 0, "made-up-2"), &sealed), None, "moved to another credential");
        for at in [0, NONCE_LEN, SEALED_BYTES - 1] {
            let mut bent = sealed.clone();
            bent[at] ^= 1;
            assert_eq!(opened(&old, 0, &name, &bent), None, "bit of byte {at}");
        }
        for length in [0, NONCE_LEN, NONCE_LEN + MAX_TAG_LEN - 1] {
            assert_eq!(opened(&old, 0, &name, &sealed[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn notices_are_sealed_too() {
        let (old, both, new) = (keys(OLD), keys(&format!("{NEW}\n{OLD}")), keys(NEW));
        let (refused, fine) = (Notice { id: [7; 32], refused: true }, Notice { id: [7; 32], refused: false });
        let (sealed, other) = (old.seal_notice(refused).unwrap(), old.seal_notice(fine).unwrap());
        assert_eq!(sealed.len(), other.len(), "a refusal looks as any other");
        assert_eq!(
            (old.open_notice(&sealed), both.open_notice(&sealed), new.open_notice(&sealed)),
            (Some(refused), Some(refused), None)
        );
        assert_eq!(old.open_notice(&other), Some(fine));
        assert_eq!(old.open_notice(b"garbage"), None);
    }
}
