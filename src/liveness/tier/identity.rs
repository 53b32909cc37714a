//! The certificate by which the store knows a replica, if it asks for one.

use rustls::{crypto::ring, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::domain::secret::Secret;

/// A client certificate with its chain, and its private key, in PEM. They belong together.
pub struct ClientIdentity {
    pub(super) certificate: Vec<u8>,
    pub(super) key: Secret,
}

/// Why a certificate and a key are no identity. No message quotes a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityFault {
    /// The certificate's file is at fault.
    Certificate(String),
    /// The key's file is.
    Key(String),
}

// === impl ClientIdentity ===

impl ClientIdentity {
    /// Takes the contents of both files.
    pub fn new(certificate: Vec<u8>, key: Secret) -> Result<Self, IdentityFault> {
        let no_certificate = || IdentityFault::Certificate("holds no certificate in PEM".to_owned());
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(&certificate).collect::<Result<_, _>>().map_err(|_| no_certificate())?;
        if chain.is_empty() {
            return Err(no_certificate());
        }
        let private = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
            .map_err(|_| IdentityFault::Key("holds no private key in PEM (PKCS#8, PKCS#1 or SEC1, not encrypted)".to_owned()))?;
        CertifiedKey::from_der(chain, private, &ring::default_provider()).map_err(|fault| match fault {
            rustls::Error::InconsistentKeys(_) => {
                IdentityFault::Key("is not the key of the certificate in tier.client_certificate_file".to_owned())
            }
            rustls::Error::InvalidCertificate(_) => {
                IdentityFault::Certificate("holds a certificate that cannot be read".to_owned())
            }
            _ => IdentityFault::Key("holds a key of a kind that is not supported; use ECDSA P-256 or RSA".to_owned()),
        })?;
        Ok(Self { certificate, key })
    }
}

impl std::fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientIdentity(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(certificate: &str, key: &str) -> Result<(), IdentityFault> {
        ClientIdentity::new(certificate.as_bytes().to_vec(), Secret::new(key.to_owned())).map(drop)
    }

    #[test]
    fn a_certificate_goes_with_its_own_key_alone() {
        let [one, other] = [(), ()].map(|()| rcgen::generate_simple_self_signed(vec!["gate.example".to_owned()]).unwrap());
        let (certificate, key) = (one.cert.pem(), one.signing_key.serialize_pem());
        assert_eq!(identity(&certificate, &key), Ok(()));
        // The chain, the authority last.
        assert_eq!(identity(&format!("{certificate}{}", other.cert.pem()), &key), Ok(()));
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let bent = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for (certificate, key, of_key, what) in [
            (&*certificate, &*other.signing_key.serialize_pem(), true, "not the key of the certificate"),
            (&other.cert.pem(), &key, true, "not the key of the certificate"),
            ("", &key, false, "no certificate in PEM"),
            (&key, &key, false, "no certificate in PEM"),
            (broken, &key, false, "cannot be read"),
            (&certificate, "made-up-canary", true, "no private key in PEM"),
            (&certificate, &certificate, true, "no private key in PEM"),
            (&certificate, bent, true, "not supported"),
        ] {
            let fault = identity(certificate, key).unwrap_err();
            let (is_of_key, message) = match &fault {
                IdentityFault::Key(message) => (true, message),
                IdentityFault::Certificate(message) => (false, message),
            };
            assert!(is_of_key == of_key && message.contains(what) && !message.contains("canary"), "{fault:?}");
        }
    }
}
