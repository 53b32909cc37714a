//! The keys of the cache: keyed hashes of a credential, with or without a model.

use std::hash::Hasher;

use rand::Rng;

use crate::{
    core::{credential::LivenessQuery, endpoint::Preference},
    domain::secret::{Secret, keyed_hash},
    liveness::breaker::Source,
};

/// The key of an entry.
pub(super) type Key = [u8; 32];

/// A hasher that uses a cache key's first bytes as they are. The keys are keyed hashes already.
#[derive(Default)]
pub(super) struct PrehashedHasher(u64);

impl Hasher for PrehashedHasher {
    fn write(&mut self, bytes: &[u8]) {
        for (at, byte) in bytes.iter().take(8).enumerate() {
            self.0 ^= u64::from(*byte) << (8 * at);
        }
    }

    /// Ignores the length prefix: all keys have the same length.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The keys that an observation may be stored under.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys<'a> {
    /// The credential with any model, or with its model if every probe names it. One probe at a time runs per this key.
    pub(super) first: Key,
    /// The model, if only some probes name it. Their findings are stored under a second key.
    pub(super) model: Option<&'a str>,
}

/// What the keys are made with: one hash key for credentials, one for a credential with one model. Each process makes new ones, so that a cache key
/// in a memory image reveals nothing about a credential.
#[derive(Debug)]
pub(super) struct HashKeys {
    of_credential: [u8; 32],
    of_model: [u8; 32],
}

// === impl HashKeys ===

impl HashKeys {
    pub(super) fn random() -> Self {
        let mut rng = rand::rng();
        Self { of_credential: rng.random(), of_model: rng.random() }
    }

    pub(super) fn keys<'a>(&self, query: &LivenessQuery<'a>) -> Keys<'a> {
        let LivenessQuery { endpoint, ref secret, model, preference, .. } = *query;
        let Self { of_credential, of_model } = self;
        let credential = key_of(of_credential, secret, &endpoint.identity, client_of(preference));
        if endpoint.names_model {
            Keys { first: hash(of_model, &[&credential, model.as_bytes()]), model: None }
        } else {
            Keys { first: credential, model: Some(model) }
        }
    }

    /// The key of a finding that is about one model, if it differs from the first key.
    pub(super) fn second(&self, keys: &Keys<'_>) -> Option<Key> {
        keys.model.map(|model| hash(&self.of_model, &[&keys.first, model.as_bytes()]))
    }

    /// The source of the call, as the circuit breaker distinguishes them: the organization, or else the credential.
    pub(super) fn source(&self, query: &LivenessQuery<'_>, keys: &Keys<'_>) -> Source {
        if query.organization.is_empty() {
            return keys.first;
        }
        *blake3::keyed_hash(&self.of_credential, query.organization.as_bytes()).as_bytes()
    }
}

/// Encodes the client for the cache key: a provider may answer another client differently.
pub(super) fn client_of(Preference { family, surface }: Preference) -> [u8; 2] {
    [family.map_or(0, |family| family as u8 + 1), surface.map_or(0, |surface| surface as u8 + 1)]
}

/// The key of a value at one endpoint, as one kind of client sends it.
///
/// Only the value is hashed, and no other hash reads it. Nobody can choose or foresee that hash, so it is enough to combine it with the rest: two values at
/// two endpoints would share a key only if their hashes differed in exactly the bits in which the endpoints' identities do.
fn key_of(hash_key: &[u8; 32], secret: &Secret, identity: &[u8; 32], client: [u8; 2]) -> Key {
    let mut key = keyed_hash(hash_key, secret.expose().as_bytes());
    key.iter_mut().zip(identity).for_each(|(byte, with)| *byte ^= with);
    key.iter_mut().zip(client).for_each(|(byte, with)| *byte ^= with);
    key
}

/// Hashes the parts to a key. All parts but the last have a fixed length, so no separator is needed.
fn hash(hash_key: &[u8; 32], parts: &[&[u8]]) -> Key {
    let mut hasher = blake3::Hasher::new_keyed(hash_key);
    for part in parts {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_value_endpoint_and_client_has_a_key_of_its_own() {
        let hash_keys = [[1; 32], [2; 32]];
        // A short value, and one that the hash function treats as a tree.
        let values = ["made-up-key-1", "made-up-key-2", &"made-up-key-3".repeat(200)].map(|value| Secret::new(value.to_owned()));
        let identities = ["acme", "other"].map(|of| *blake3::hash(of.as_bytes()).as_bytes());
        let clients = [[0, 0], [1, 0], [0, 1], [1, 1]];
        let mut keys = BTreeSet::new();
        for hash_key in &hash_keys {
            for value in &values {
                for identity in &identities {
                    keys.extend(clients.map(|client| key_of(hash_key, value, identity, client)));
                }
            }
        }
        assert_eq!(keys.len(), hash_keys.len() * values.len() * identities.len() * clients.len());
    }
}
