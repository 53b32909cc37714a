//! Made-up keys: what an endpoint is asked with to see whether it refuses what nobody issued.
//!
//! A server may look at no more than a key's form (its length, its alphabet) before it says yes. So the made-up key has the form of the key that it
//! is compared with, and a "yes" counts only where a made-up key of that form is refused. What a server checks beyond the form, as a checksum in
//! the key, stays unseen.

use crate::domain::secret::Secret;

/// The random part of a made-up key of no given form.
const USUAL_LENGTH: usize = 48;
/// How a key begins where nobody knows.
const USUAL_PREFIX: &str = "sk-";
/// With fewer random characters than this, or fewer bits, a made-up key could be somebody's.
const MIN_RANDOM: usize = 12;
const MIN_BITS: usize = 40;
/// The first word of a key, as `acme_`, is no longer than this.
const MAX_FIRST_WORD: usize = 12;
/// Nor is a word behind it that is no usual one, of which there are few, and which leave so many letters and digits.
const MAX_WORD: usize = 8;
const MAX_WORDS: usize = 3;
const LEFT_BY_WORDS: usize = 16;
/// So many letters at the beginning of a key without marks may be its vendor's.
const MAX_FIRST_LETTERS: usize = 6;

/// The form of a key, as far as a server can check it without knowing the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyForm {
    length: usize,
    alphabet: Alphabet,
    has_dash: bool,
    has_underscore: bool,
    has_other: bool,
}

/// Out of what a key's letters and digits are.
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

    /// About how many bits of chance each character has that stands in another's place.
    fn bits(self) -> usize {
        match self {
            Self::Digits => 3,
            Self::LowerHex | Self::UpperHex | Self::Lower | Self::Upper => 4,
            Self::Mixed => 5,
        }
    }

    /// A character that may stand in this one's place. `random`: a number below the given one. Where there are letters, only those characters that
    /// every usual alphabet has: base32 has neither 0, 1, 8 nor 9, base58 neither 0, O, I nor l, Crockford's base32 neither I, L, O nor U.
    fn another(self, byte: u8, random: &mut impl FnMut(u8) -> u8) -> u8 {
        let among: &[u8] = match (self, byte) {
            (Self::Digits | Self::LowerHex | Self::UpperHex, b'0'..=b'9') => b"0123456789",
            (_, b'0'..=b'9') => b"234567",
            (Self::LowerHex, b'a'..=b'z') => b"abcdef",
            (Self::UpperHex, b'A'..=b'Z') => b"ABCDEF",
            (_, b'a'..=b'z') => b"abcdefghijkmnopqrstuvwxyz",
            (_, b'A'..=b'Z') => b"ABCDEFGHJKMNPQRSTVWXYZ",
            _ => return byte,
        };
        let at = random(u8::try_from(among.len()).unwrap_or(u8::MAX));
        among.get(usize::from(at)).copied().unwrap_or(byte)
    }
}

/// A key that nobody issued, of the vendor's prefix. `random`: a number below the given one.
pub fn made_up_key(prefix: Option<&str>, mut random: impl FnMut(u8) -> u8) -> Secret {
    let mut key = prefix.unwrap_or(USUAL_PREFIX).to_owned();
    key.extend((0..USUAL_LENGTH).map(|_| char::from(*ALPHANUMERIC.get(usize::from(random(62))).unwrap_or(&b'a'))));
    Secret::new(key)
}

/// Whether there can be a made-up key of the form of this one.
pub fn can_be_imitated(key: &Secret, prefix: Option<&str>) -> bool {
    imitable(key, prefix).is_some()
}

/// What a made-up key has of this one, and what it has others in place of.
fn imitable<'k>(key: &'k Secret, prefix: Option<&str>) -> Option<(&'k str, &'k str)> {
    let text = key.expose();
    let of_vendor = prefix.filter(|prefix| text.starts_with(prefix)).map_or(0, str::len);
    let (kept, rest) = text.split_at_checked(of_vendor.max(first_words(text).len()))?;
    let random = letters_and_digits(rest);
    let has_room = random >= MIN_RANDOM || random * Alphabet::of(rest.bytes()).bits() >= MIN_BITS;
    (rest.is_ascii() && has_room).then_some((kept, rest))
}

/// A key that nobody issued, and its form: that of this one. It has this one's first words or the vendor's prefix, and another character of the same
/// kind for every letter and digit behind it. A key that is too short for that gets the usual one, of the usual form.
pub fn made_up_key_like(key: &Secret, prefix: Option<&str>, mut random: impl FnMut(u8) -> u8) -> (Secret, KeyForm) {
    let Some((kept, rest)) = imitable(key, prefix) else {
        let usual = made_up_key(prefix, random);
        let form = KeyForm::of(&usual);
        return (usual, form);
    };
    let alphabet = Alphabet::of(rest.bytes());
    // Version and variant of a UUID are no part of its random numbers.
    let is_uuid = rest.len() == 36 && [8, 13, 18, 23].iter().all(|at| rest.as_bytes().get(*at) == Some(&b'-'));
    // Base64's last character has fewer bits where it is filled up.
    let data = rest.trim_end_matches('=').len();
    let stays = |at: usize| is_uuid && matches!(at, 14 | 19) || data < rest.len() && at + 1 == data;
    let another = rest.bytes().enumerate().map(|(at, byte)| if stays(at) { byte } else { alphabet.another(byte, &mut random) });
    let made_up: String = kept.chars().chain(another.map(char::from)).collect();
    (Secret::new(made_up), KeyForm::of(key))
}

/// `acme_live_` of `acme_live_0123`: words before the random part, or a few letters where there is no mark. Of a signed token in three parts, its
/// head, which holds no secret.
fn first_words(key: &str) -> &str {
    if key.starts_with("eyJ") && key.bytes().filter(|byte| *byte == b'.').count() == 2 {
        return key.find('.').and_then(|end| key.get(..=end)).unwrap_or_default();
    }
    let (mut kept, mut words) = (0, 0);
    while let Some(rest) = key.get(kept..)
        && let Some(end) = rest.find(['-', '_', '.', ':', '/']).filter(|end| *end < MAX_FIRST_WORD)
        && let (Some(word), Some(behind)) = (rest.get(..end), rest.get(end..))
    {
        let letters = word.trim_end_matches(|c: char| c.is_ascii_digit());
        let is_word = word.len() - letters.len() <= 2 && letters.bytes().all(|byte| byte.is_ascii_alphabetic());
        let is_usual = || USUAL_WORDS.iter().any(|usual| usual.eq_ignore_ascii_case(letters));
        if !is_word || kept > 0 && !is_usual() && !(words < MAX_WORDS && is_plain_word(letters, behind)) {
            break;
        }
        kept += end + 1;
        words += 1;
    }
    if kept == 0 && !key.contains(['-', '_', '.', ':', '/']) {
        let letters = key.bytes().take(MAX_FIRST_LETTERS).take_while(u8::is_ascii_alphabetic).count();
        kept = key.get(letters..).filter(|rest| letters_and_digits(rest) >= LEFT_BY_WORDS).map_or(0, |_| letters);
    }
    key.get(..kept).unwrap_or_default()
}

/// Letters of one case, which random ones hardly are.
fn is_plain_word(letters: &str, behind: &str) -> bool {
    let is_of_one_case =
        letters.bytes().all(|byte| byte.is_ascii_lowercase()) || letters.bytes().all(|byte| byte.is_ascii_uppercase());
    !letters.is_empty() && letters.len() <= MAX_WORD && is_of_one_case && letters_and_digits(behind) >= LEFT_BY_WORDS
}

fn letters_and_digits(text: &str) -> usize {
    text.bytes().filter(u8::is_ascii_alphanumeric).count()
}

/// What stands behind the first word of a key, before its random part; with up to two digits behind it.
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
            ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl", None, "eyJhbGciOiJIUzI1NiJ9."),
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
            // Random words are not kept without end.
            ("ab-cd-ef-gh-ij-0123456789abcdefGHIJklmnop", None, "ab-cd-ef-"),
        ] {
            let made_up = like(key, prefix);
            let form = |key: &str| KeyForm::of(&Secret::new(key.into()));
            assert_eq!(form(&made_up), form(key), "{made_up}");
            assert_eq!(made_up.get(..kept.len()), Some(kept));
            let filled_up = |key: &str| key.ends_with('=').then(|| key.chars().rev().find(|last| *last != '='));
            assert_eq!(filled_up(&made_up), filled_up(key), "{made_up}");
            let same = made_up.bytes().zip(key.bytes()).skip(kept.len());
            let same = same.filter(|(one, two)| one == two && one.is_ascii_alphanumeric()).count();
            assert!(same * 3 < key.len(), "{made_up} is too much of {key}");
        }
    }

    #[test]
    fn a_short_key_is_never_hit_by_chance() {
        for key in ["sk-1234", "sk-12345678901", "password", "tenant-good", "ключ-ключ-ключ-ключ"] {
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
