//! What a value looks like, before any of it is sent: fit for a header, whose key, and of which kind.

use crate::{
    core::{
        catalogue::{Catalogue, KeyKind},
        endpoint::{Endpoint, NoSurface},
    },
    domain::{
        denial::{Malformation, Refusal},
        request::is_plain,
        secret::Secret,
    },
};

/// The longest value that could be a key. Anthropic's are about 110 bytes, JWT keys a few KiB.
const MAX_KEY_BYTES: usize = 16 * 1024;

/// Why this value is not one to send to this endpoint: its characters, its length, or whose key it looks like.
pub fn unsendable(
    catalogue: &Catalogue,
    endpoint: &Endpoint,
    env_name: &str,
    secret: &Secret,
) -> Result<Option<Refusal>, NoSurface> {
    let value = secret.expose();
    let (env_name, provider) = (|| env_name.to_owned(), || endpoint.provider.clone());
    if let Some(fault) = malformation(value) {
        return Ok(Some(Refusal::Malformed { env_name: env_name(), provider: provider(), fault }));
    }
    let shapes = catalogue.shapes_of(value.trim_ascii_start());
    let vendor = shapes.first().map(|shape| shape.vendor.as_str());
    if let Some(vendor) = vendor
        && shapes.iter().all(|shape| shape.vendor == vendor)
        && endpoint.vendor.as_deref() != Some(vendor)
    {
        return Ok(Some(Refusal::ForeignKey {
            env_name: env_name(),
            provider: provider(),
            host: endpoint.host.clone(),
            vendor: vendor.to_owned(),
        }));
    }
    if shapes.iter().any(|shape| shape.kind == KeyKind::OAuth) {
        return Err(NoSurface::OAuthShaped);
    }
    Ok(None)
}

/// Whose administrative key this looks like.
pub(super) fn administrative<'c>(catalogue: &'c Catalogue, secret: &Secret) -> Option<&'c str> {
    let shapes = catalogue.shapes_of(secret.expose().trim_ascii_start());
    shapes.iter().find(|shape| shape.kind == KeyKind::Administrative).map(|shape| shape.vendor.as_str())
}

fn malformation(value: &str) -> Option<Malformation> {
    if value.len() > MAX_KEY_BYTES {
        return Some(Malformation::TooLong { length: value.len(), limit: MAX_KEY_BYTES });
    }
    if is_plain(value) {
        return None;
    }
    let (at, byte) = value.bytes().enumerate().find(|(_, byte)| byte.is_ascii_control() || !byte.is_ascii())?;
    if !byte.is_ascii() {
        return Some(Malformation::NonAscii { at });
    }
    let trailing = value.bytes().skip(at).all(|byte| byte.is_ascii_control() || byte == b' ');
    Some(Malformation::ControlCharacter { at, trailing })
}
