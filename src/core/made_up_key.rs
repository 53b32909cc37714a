//! Makes keys that nobody has issued. An endpoint that refuses them is known to check keys.
//!
//! A server may check only the form of a key (its length, its alphabet) before it accepts it. So a made-up key has the form of the real key that it
//! is compared with, and a success response counts only if a made-up key of that form is refused. Of a signed token it keeps the claims, which a server
//! can check locally. A checksum in the key is not imitated.

use std::collections::BTreeSet;

use crate::domain::secret::Secret;

/// The length of the random part, if no real key gives the form.
const USUAL_LENGTH: usize = 48;
/// The prefix, if the catalogue knows none.
const USUAL_PREFIX: &str = "sk-";
/// With fewer random characters or bits than these, a made-up key could be somebody's real key.
const MIN_RANDOM: usize = 12;
const MIN_BITS: usize = 40;
/// The longest word at the beginning of a key, such as `acme_`, with its separator.
const MAX_FIRST_WORD: usize = 12;
/// A second or third word may be an uncommon one only if it is this short, if there are no more words than this, and if this many letters and digits
/// follow.
const MAX_WORD: usize = 8;
const MAX_WORDS: usize = 3;
const MIN_AFTER_WORDS: usize = 16;
/// Where no word ends in a separator, this many letters at the beginning may be the vendor's prefix, and more if only hexadecimal digits follow.
const MAX_FIRST_LETTERS: usize = 6;
const MAX_LETTERS_BEFORE_HEX: usize = 12;
/// A part of a key between two separators has its own alphabet if it is this long.
const MIN_PART: usize = 16;

/// The form of a key: what a server can check without knowing the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyForm {
    length: usize,
    alphabet: Alphabet,
    has_dash: bool,
    has_underscore: bool,
    has_other: bool,
}

/// The characters that a key's letters and digits are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Alphabet {
    Digits,
    LowerHex,
    UpperHex,
    Lower,
    Upper,
    #[default]
    Mixed,
}

// === impl KeyForm ===

impl KeyForm {
    /// The form of this key.
    pub fn of(key: &Secret) -> Self {
        let key = key.expose();
        let word = first_words(key).len();
        let bytes = || key.bytes().skip(word);
        Self {
            length: key.len(),
            alphabet: Alphabet::of(bytes()),
            has_dash: bytes().any(|byte| byte == b'-'),
            has_underscore: bytes().any(|byte| byte == b'_'),
            has_other: bytes().any(|byte| !byte.is_ascii_alphanumeric() && byte != b'-' && byte != b'_'),
        }
    }
}

// === impl Alphabet ===

impl Alphabet {
    fn of(bytes: impl Iterator<Item = u8>) -> Self {
        let (mut digits, mut upper, mut lower, mut beyond_hex) = (false, false, false, false);
        for byte in bytes {
            digits |= byte.is_ascii_digit();
            upper |= byte.is_ascii_uppercase();
            lower |= byte.is_ascii_lowercase();
            beyond_hex |= byte.is_ascii_alphabetic() && !byte.is_ascii_hexdigit();
        }
        match (upper, lower) {
            (false, false) => Self::Digits,
            (true, true) => Self::Mixed,
            (false, true) if digits && !beyond_hex => Self::LowerHex,
            (true, false) if digits && !beyond_hex => Self::UpperHex,
            (false, true) => Self::Lower,
            (true, false) => Self::Upper,
        }
    }

    /// About how many random bits a character has.
    fn bits(self) -> usize {
        match self {
            Self::Digits => 3,
            Self::LowerHex | Self::UpperHex | Self::Lower | Self::Upper => 4,
            Self::Mixed => 5,
        }
    }
}

/// What the characters of a key, or of a part of it, are replaced by: those of the same kind that it has itself. So hexadecimal digits stay such, and
/// so do base32, base58 and octal digits. Where it has too few, usual ones are taken.
struct Replacements {
    kinds: [Vec<u8>; 3],
}

impl Replacements {
    fn of(text: &str) -> Self {
        let usual = match Alphabet::of(text.bytes()) {
            Alphabet::Digits => ["0123456789", "", ""],
            Alphabet::LowerHex => ["0123456789", "abcdef", ""],
            Alphabet::UpperHex => ["0123456789", "", "ABCDEF"],
            // What base32, base58 and Crockford's base32 have in common.
            Alphabet::Lower | Alphabet::Upper | Alphabet::Mixed => {
                ["234567", "abcdefghijkmnopqrstuvwxyz", "ABCDEFGHJKMNPQRSTVWXYZ"]
            }
        };
        let seen = Self { kinds: [0, 1, 2].map(|kind| distinct(text.bytes().filter(|byte| kind_of(*byte) == Some(kind)))) };
        let usual = Self { kinds: usual.map(|among| among.bytes().collect()) };
        if letters_and_digits(text) >= MIN_PART && seen.bits(text) >= MIN_BITS { seen } else { usual }
    }

    /// About how many random bits the replacement of this text has.
    fn bits(&self, text: &str) -> usize {
        text.bytes().filter_map(|byte| self.kinds.get(kind_of(byte)?)).map(|among| among.len().max(1).ilog2() as usize).sum()
    }

    fn replace(&self, byte: u8, random: &mut impl FnMut(u8) -> u8) -> u8 {
        let Some(among) = kind_of(byte).and_then(|kind| self.kinds.get(kind)).filter(|among| !among.is_empty()) else {
            return byte;
        };
        let at = random(u8::try_from(among.len()).unwrap_or(u8::MAX));
        among.get(usize::from(at)).copied().unwrap_or(byte)
    }
}

/// Digits, small letters and capitals are replaced by their like; other characters stay.
const fn kind_of(byte: u8) -> Option<usize> {
    match byte {
        b'0'..=b'9' => Some(0),
        b'a'..=b'z' => Some(1),
        b'A'..=b'Z' => Some(2),
        _ => None,
    }
}

fn distinct(bytes: impl Iterator<Item = u8>) -> Vec<u8> {
    bytes.collect::<BTreeSet<_>>().into_iter().collect()
}

/// A made-up key with the vendor's prefix. `random` returns a number below its argument.
pub fn made_up_key(prefix: Option<&str>, mut random: impl FnMut(u8) -> u8) -> Secret {
    let mut key = prefix.unwrap_or(USUAL_PREFIX).to_owned();
    key.extend((0..USUAL_LENGTH).map(|_| char::from(*ALPHANUMERIC.get(usize::from(random(62))).unwrap_or(&b'a'))));
    Secret::new(key)
}

/// Whether a made-up key can have the form of this key.
pub fn can_be_imitated(key: &Secret, prefix: Option<&str>) -> bool {
    split_for_imitation(key, prefix).is_some()
}

/// The part of a key that a made-up key keeps, and the part that it replaces. `None` if too little would be random.
fn split_for_imitation<'k>(key: &'k Secret, prefix: Option<&str>) -> Option<(&'k str, &'k str)> {
    let text = key.expose();
    let of_vendor = prefix.filter(|prefix| text.starts_with(prefix)).map_or(0, str::len);
    let (kept, rest) = text.split_at_checked(of_vendor.max(first_words(text).len()))?;
    let random = letters_and_digits(rest);
    let has_room = random >= MIN_RANDOM || random * Alphabet::of(rest.bytes()).bits() >= MIN_BITS;
    (rest.is_ascii() && has_room).then_some((kept, rest))
}

/// A made-up key with the form of this key, and that form. It keeps the first words or the vendor's prefix, and replaces every letter and digit after
/// them by a random one of the same kind. If the key is too short for that, the result is a key of the usual form.
pub fn made_up_key_like(key: &Secret, prefix: Option<&str>, mut random: impl FnMut(u8) -> u8) -> (Secret, KeyForm) {
    let Some((kept, rest)) = split_for_imitation(key, prefix) else {
        let usual = made_up_key(prefix, random);
        let form = KeyForm::of(&usual);
        return (usual, form);
    };
    let whole = Replacements::of(rest);
    // The version and the variant of a UUID are not random.
    let is_uuid = is_uuid(rest);
    // The last character of base64 may hold fewer bits, so it is kept.
    let data = rest.trim_end_matches('=').len();
    let is_base64 = data < rest.len() || is_signed_token(key.expose());
    let stays = |at: usize| is_uuid && matches!(at, 14 | 19) || is_base64 && at + 1 == data;
    let mut made_up = kept.to_owned();
    for part in rest.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let own = (letters_and_digits(part) >= MIN_PART).then(|| Replacements::of(part));
        let replacements = own.as_ref().unwrap_or(&whole);
        for byte in part.bytes() {
            let at = made_up.len() - kept.len();
            made_up.push(char::from(if stays(at) { byte } else { replacements.replace(byte, &mut random) }));
        }
    }
    (Secret::new(made_up), KeyForm::of(key))
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36 && [8, 13, 18, 23].iter().all(|at| text.as_bytes().get(*at) == Some(&b'-'))
}

/// Whether the key is a JWT: header, claims and signature.
fn is_signed_token(key: &str) -> bool {
    key.starts_with("eyJ") && key.bytes().filter(|byte| *byte == b'.').count() == 2
}

/// The words before the random part: `acme_live_` of `acme_live_0123`. Without separators, a few letters. Of a JWT, everything before its
/// signature: the rest is no secret to the server that it is sent to, and a server may check it before the signature.
fn first_words(key: &str) -> &str {
    if is_signed_token(key) {
        return key.rfind('.').and_then(|end| key.get(..=end)).unwrap_or_default();
    }
    if is_uuid(key) {
        return "";
    }
    let (mut kept, mut words) = (0, 0);
    while let Some(rest) = key.get(kept..)
        && let Some(end) = rest.find(['-', '_', '.', ':', '/']).filter(|end| *end < MAX_FIRST_WORD)
        && let (Some(word), Some(behind)) = (rest.get(..end), rest.get(end..))
    {
        let letters = word.trim_end_matches(|c: char| c.is_ascii_digit());
        let digits = word.len() - letters.len();
        let is_usual = USUAL_WORDS.iter().any(|usual| usual.eq_ignore_ascii_case(letters));
        let has_more = letters_and_digits(behind) >= MIN_AFTER_WORDS;
        // A version, or a number after a word such as `org`.
        let is_number = kept > 0 && has_more && (letters.is_empty() && digits <= 2 || is_usual && digits <= MAX_WORD);
        let is_word = digits <= 2 && letters.bytes().all(|byte| byte.is_ascii_alphabetic());
        if !is_number && (!is_word || kept > 0 && !is_usual && !(words < MAX_WORDS && has_more && is_plain_word(letters))) {
            break;
        }
        kept += end + 1;
        words += 1;
    }
    if kept == 0 {
        let letters = |most: usize| key.bytes().take(most).take_while(u8::is_ascii_alphabetic).count();
        let hex = match key.strip_prefix("0x") {
            Some(_) => 2,
            None => letters(MAX_LETTERS_BEFORE_HEX),
        };
        let is_before_hex = key.bytes().skip(hex).all(|byte| byte.is_ascii_hexdigit());
        let first = if is_before_hex { hex } else { letters(MAX_FIRST_LETTERS) };
        kept = key.get(first..).filter(|rest| letters_and_digits(rest) >= MIN_AFTER_WORDS).map_or(0, |_| first);
    }
    key.get(..kept).unwrap_or_default()
}

/// Whether these are letters of one case, which is rare in random text.
fn is_plain_word(letters: &str) -> bool {
    let is_of_one_case =
        letters.bytes().all(|byte| byte.is_ascii_lowercase()) || letters.bytes().all(|byte| byte.is_ascii_uppercase());
    !letters.is_empty() && letters.len() <= MAX_WORD && is_of_one_case
}

fn letters_and_digits(text: &str) -> usize {
    text.bytes().filter(u8::is_ascii_alphanumeric).count()
}

/// Words that commonly follow the first word of a key. Each may end in up to two digits.
const USUAL_WORDS: [&str; 21] = [
    "v",
    "api",
    "key",
    "live",
    "test",
    "prod",
    "dev",
    "stage",
    "proj",
    "project",
    "svc",
    "svcacct",
    "svcaccount",
    "admin",
    "or",
    "ant",
    "gw",
    "virt",
    "user",
    "team",
    "org",
];

const ALPHANUMERIC: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

#[cfg(test)]
mod tests {
    use super::*;

    fn like(key: &str, prefix: Option<&str>) -> String {
        let mut next = 0_u8;
        let random = |below: u8| {
            next = next.wrapping_mul(5).wrapping_add(3);
            next % below
        };
        made_up_key_like(&Secret::new(key.into()), prefix, random).0.expose().to_owned()
    }

    #[test]
    fn it_has_the_form_and_nothing_else_of_the_key() {
        for (key, prefix, kept) in [
            ("sk-9f8e7d6c5b4a39281706f5e4d3c2b1a0ffee", None, "sk-"),
            ("acme_LIVE0123456789abcdEFGH", None, "acme_"),
            ("acme_live_0123456789abcdefg", None, "acme_live_"),
            ("sk-svc-v1-0123456789abcdefg", None, "sk-svc-v1-"),
            (
                "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5Nx1234567XgL0n3I9PlFUP0",
                None,
                "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.",
            ),
            ("550e8400-e29b-41d4-a716-446655440000", None, ""),
            ("ABCDEFGHJKMNPQRSTVWXYZ234567", None, ""),
            ("sk-ant-api03-AbCd_EfGh-0123456789xyz", Some("sk-ant-"), "sk-ant-"),
            ("0123456789012345", Some("sk-"), ""),
            ("sk-acme-v1-0123456789abcdefGHIJ", None, "sk-acme-v1-"),
            ("team-a/0123456789abcdefGHIJ", None, "team-a/"),
            ("ACME0123456789abcdefGHIJ", None, "ACME"),
            ("sk-Ab12Cd34Ef5", None, "sk-"),
            ("x9Kd83Jq", None, ""),
            ("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", None, ""),
            // At most three words are kept, since random text may look like words.
            ("ab-cd-ef-gh-ij-0123456789abcdefGHIJklmnop", None, "ab-cd-ef-"),
        ] {
            let made_up = like(key, prefix);
            let form = |key: &str| KeyForm::of(&Secret::new(key.into()));
            assert_eq!(form(&made_up), form(key), "{made_up}");
            assert_eq!(made_up.get(..kept.len()), Some(kept));
            let filled_up = |key: &str| key.ends_with('=').then(|| key.chars().rev().find(|last| *last != '='));
            assert_eq!(filled_up(&made_up), filled_up(key), "{made_up}");
            assert!(!is_signed_token(key) || made_up.ends_with('0'), "{made_up}");
            let same = made_up.bytes().zip(key.bytes()).skip(kept.len());
            let same = same.filter(|(one, two)| one == two && one.is_ascii_alphanumeric()).count();
            assert!(same * 3 < key.len(), "{made_up} is too much of {key}");
        }
    }

    #[test]
    fn it_stays_within_what_a_server_can_check_locally() {
        const HEX: &str = "0123456789abcdef";
        // The key, the beginning that stays, and the alphabet of a part of it.
        for (key, kept, alphabet, part) in [
            ("AIzaSy2BFvKq9w_U38xZtR4mN-7pLc1sEoYdGhV", "AIzaSy", "", 0..0),
            ("e19c751bd2f3a9c4b7e06f1c2a547f0e.AbCd3fGhIjKlMn0p", "", HEX, 0..32),
            ("AbCdEfGhIj12:6f1c2a547f0e4c8e9a51d2f3a9c4b7e0e19c751b", "", HEX, 13..53),
            ("0x6f1c2a547f0e4c8e9a51d2f3a9c4b7e0e19c751b", "0x", HEX, 2..42),
            ("oc0123456701234567012345670123456701234567", "oc", "01234567", 2..42),
            ("acmeprod6f1c2a547f0e4c8e9a51d2f3a9c4b7e0", "acmeprod", HEX, 8..40),
            // The version and the variant of a UUID, whether it begins with a letter or a digit.
            ("eaf08400-e29b-41d4-a716-446655440000", "", "4", 14..15),
            ("eaf08400-e29b-41d4-a716-446655440000", "", "a", 19..20),
            ("550e8400-e29b-41d4-a716-446655440000", "", "4", 14..15),
            ("key-v1.2-AbCdEfGhIjKlMnOpQrSt1234", "key-v1.2-", "", 0..0),
            ("acme_eu-west-1_AbCdEfGhIjKlMnOpQrSt1234", "acme_eu-west-1_", "", 0..0),
            ("zk_org1234_AbCdEfGhIjKlMnOpQrSt1234", "zk_org1234_", "", 0..0),
        ] {
            let made_up = like(key, None);
            assert!(made_up.starts_with(kept) && made_up.len() == key.len() && made_up != key, "{key}: {made_up}");
            let part = made_up.get(part).unwrap();
            assert!(part.chars().all(|c| alphabet.contains(c)), "{key}: {made_up}");
        }
    }

    #[test]
    fn a_short_key_is_never_hit_by_chance() {
        for key in [
            "eyJhbGciOiJub25lIn0.eyJzdWIiOiIxMjM0NTY3ODkwIn0.",
            "sk-1234",
            "sk-12345678901",
            "password",
            "tenant-good",
            "ключ-ключ-ключ-ключ",
        ] {
            assert_eq!(like(key, None).len(), USUAL_PREFIX.len() + USUAL_LENGTH, "{key}");
        }
    }

    #[test]
    fn forms_that_a_server_can_tell_apart_differ() {
        let forms = [
            "sk-0123456789abcdef",
            "sk-0123456789abcdefa",
            "sk-0123456789ABCDEF",
            "sk-0123456789012345",
            "sk-0123456789abcdxy",
            "sk-0123456789aBcdxy",
            "sk-0123456-89abcdef",
            "sk-0123456_89abcdef",
            "sk-0123456.89abcdef",
        ];
        let forms = forms.map(|key| KeyForm::of(&Secret::new(key.into())));
        for (at, one) in forms.iter().enumerate() {
            assert!(forms.iter().skip(at + 1).all(|other| one != other), "{at}");
        }
    }
}
