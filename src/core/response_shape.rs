//! The shape of a response. Two shapes can be compared, to see whether a key gets the response that a made-up key gets.
//!
//! Two responses are alike if status, kind of body and error code are the same and at most one word in eight differs. What changes in every response
//! is left out first: words with a digit (ids, times, counts), very long words, and keys that are echoed whole or masked.

use std::{
    cmp::Ordering,
    hash::{DefaultHasher, Hash, Hasher},
};

use super::answer::{Answer, Body};

/// The most bytes of a body that are read.
const MAX_BYTES: usize = 16 * 1024;
/// The most words that are compared.
const MAX_WORDS: usize = 256;
/// Responses are alike if at most one word in this many differs.
const WORDS_PER_DIFFERENCE: usize = 8;
/// For two kinds of request: one response may have one more word in this many.
const WORDS_PER_EXTRA: usize = 4;
/// A word longer than this is an id, a token or a key.
const MAX_WORD: usize = 32;
/// The longest word that is taken for an error's code.
const MAX_CODE: usize = 8;
/// A key, or a part of a key, must have this many bytes to be recognised in a response. Shorter ones match words by chance.
const MIN_ECHOED_BYTES: usize = 8;

/// How servers say that a key is not well formed, in lower case. LM Studio says "malformed", PyJWT "not enough segments", jsonwebtoken "jwt
/// malformed" (their code, November 2026).
const ABOUT_THE_FORM: [&str; 9] = [
    "malformed",
    "checksum",
    "invalid format",
    "invalid_format",
    "key format",
    "key_format",
    "token format",
    "token_format",
    "not enough segments",
];

/// What a refusal of a key speaks of, in lower case, and "no such path" does not.
const ABOUT_CREDENTIALS: [&str; 12] =
    ["key", "token", "auth", "credential", "account", "user", "tenant", "customer", "subscri", "login", "bearer", "licen"];

/// What makes a response comparable with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseShape {
    /// The HTTP status.
    pub status: u16,
    /// The kind of body.
    pub body: Body,
    /// The error code; empty if the response has none.
    pub code: String,
    /// It says that the key is not well formed.
    pub is_about_the_form: bool,
    /// Some word of it is about credentials or accounts.
    pub is_about_credentials: bool,
    /// The hashes of the words, sorted.
    words: Vec<u64>,
}

impl ResponseShape {
    /// The shape of a response to a request with this credential.
    pub fn of(answer: Answer<'_>, credential: &str) -> Self {
        let (body, code) = answer.body_and_code();
        let text = String::from_utf8_lossy(answer.body.get(..MAX_BYTES).unwrap_or(answer.body)).to_lowercase();
        let credential = credential.to_lowercase();
        let words = text.split(|c: char| c.is_whitespace() || "\"'`{}[]()<>,:;=&".contains(c));
        let words = words.map(|word| word.trim_matches(|c: char| ".!?/".contains(c))).filter(|word| !word.is_empty());
        let mut hashes: Vec<u64> = Vec::new();
        let mut before = "";
        for word in words.take(MAX_WORDS) {
            // A number after the name of a code is the code, and not an id.
            let is_code = names_a_code(before) && word.len() <= MAX_CODE;
            if is_masked_or_echoed_key(word, &credential) || word.is_ascii() && !is_code && is_an_id(word) {
                hashes.push(hash("#"));
            } else if word.is_ascii() {
                hashes.push(hash(word));
            } else {
                // Some languages do not put blanks between words, so compare characters.
                hashes.extend(word.chars().take(MAX_WORDS).map(|character| hash(character.encode_utf8(&mut [0; 4]))));
            }
            before = word;
        }
        hashes.truncate(2 * MAX_WORDS);
        hashes.sort_unstable();
        let is_about_the_form = ABOUT_THE_FORM.iter().any(|part| text.contains(part));
        // A model's tokens are none: "unsupported parameter max_tokens".
        let about = text.replace("tokens", "");
        let is_about_credentials = ABOUT_CREDENTIALS.iter().any(|part| about.contains(part));
        Self { status: answer.status, body, code, is_about_the_form, is_about_credentials, words: hashes }
    }

    /// Whether the two responses are about the same.
    pub fn is_like(&self, other: &Self) -> bool {
        let (mine, others) = self.count_differing_words(other);
        self.is_same_kind(other) && mine.max(others) <= self.words.len().max(other.words.len()) / WORDS_PER_DIFFERENCE
    }

    /// Whether two kinds of request got the same response. One of them may have a few more words, such as an empty list beside the error.
    pub fn matches_across_requests(&self, other: &Self) -> bool {
        let (mine, others) = self.count_differing_words(other);
        let more = mine.min(others) == 0 && mine.max(others) <= self.words.len().max(other.words.len()).div_ceil(WORDS_PER_EXTRA);
        self.is_like(other) || more && self.is_same_kind(other)
    }

    fn is_same_kind(&self, other: &Self) -> bool {
        self.status == other.status && self.body == other.body && self.code == other.code
    }

    /// How many words only this response has, and how many only the other.
    fn count_differing_words(&self, other: &Self) -> (usize, usize) {
        let (mut one, mut two) = (self.words.iter().peekable(), other.words.iter().peekable());
        let (mut only_one, mut only_two) = (0, 0);
        loop {
            let order = match (one.peek(), two.peek()) {
                (Some(left), Some(right)) => left.cmp(right),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return (only_one, only_two),
            };
            only_one += usize::from(order.is_lt());
            only_two += usize::from(order.is_gt());
            if order.is_le() {
                one.next();
            }
            if order.is_ge() {
                two.next();
            }
        }
    }
}

/// Whether a member of this name holds an error's code.
fn names_a_code(name: &str) -> bool {
    name.ends_with("code") || name.ends_with("errno") || matches!(name, "err" | "error" | "ret" | "status")
}

/// Whether the word is an echoed or masked key, which differs in each response.
fn is_masked_or_echoed_key(word: &str, credential: &str) -> bool {
    let masked = word.contains("**") || word.contains("...") || word.contains('…');
    let echoed = credential.len() >= MIN_ECHOED_BYTES
        && (word.contains(credential) || word.len() >= MIN_ECHOED_BYTES && credential.contains(word));
    masked || echoed
}

/// Whether the word is an id, a time or a count, which differ in each response.
fn is_an_id(word: &str) -> bool {
    word.len() > MAX_WORD || word.bytes().any(|byte| byte.is_ascii_digit())
}

fn hash(word: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    word.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(status: u16, body: &str, page: bool, key: &str) -> ResponseShape {
        ResponseShape::of(Answer { status, body: body.as_bytes(), truncated: false, page, retry_after: None }, key)
    }

    #[track_caller]
    fn check_alike(expected: bool, one: (u16, &str, &str), two: (u16, &str, &str)) {
        let (one, two) = (shape(one.0, one.1, false, one.2), shape(two.0, two.1, false, two.2));
        assert_eq!((one.is_like(&two), two.is_like(&one)), (expected, expected), "{one:?} {two:?}");
    }

    #[test]
    fn what_varies_by_nature_makes_no_difference() {
        check_alike(true, (401, "", "made-up-key-one"), (401, "  ", "made-up-key-two"));
        check_alike(
            true,
            (401, "Unauthorized (req_9f3a1c, 12:07:44)", "made-up-key-one"),
            (401, "Unauthorized (req_0b77de, 12:08:01)", "made-up-key-two"),
        );
        check_alike(true, (401, "key tenant-one is unknown", "tenant-one"), (401, "key sk-made-up is unknown", "sk-made-up"));
        for stars in ["***", "...", "\u{2026}"] {
            let masked = |tail: &str| format!(r#"{{"error":{{"message":"Incorrect API key: sk-ab{stars}{tail}."}}}}"#);
            check_alike(true, (401, &masked("wxyz"), "made-up-key-one"), (401, &masked("qrst"), "made-up-key-two"));
        }
        // A key within a word, a part of a key, and what is too long for a word.
        check_alike(true, (401, "no user of/tenant-one/here", "tenant-one"), (401, "no user of/sk-made-up/here", "sk-made-up"));
        check_alike(true, (401, "no key tenant-one", "tenant-one-and-more"), (401, "no key sk-made-up", "sk-made-up-and-more"));
        let word = |letter: &str, count| format!("no session {}", letter.repeat(count));
        check_alike(true, (401, &word("k", 40), "made-up-key-one"), (401, &word("w", 33), "made-up-key-two"));
        check_alike(false, (401, &word("k", 32), "made-up-key-one"), (401, &word("w", 32), "made-up-key-two"));
        let with_id =
            |id: &str| format!(r#"{{"type":"error","error":{{"type":"x","message":"no such key"}},"request_id":"{id}"}}"#);
        check_alike(true, (400, &with_id("reqabcdefgh"), "made-up-key-one"), (400, &with_id("reqijklmnop"), "made-up-key-two"));
    }

    #[test]
    fn another_request_may_get_a_word_more() {
        let shape = |status, body: &str| shape(status, body, false, "made-up-key");
        let same =
            |one: &ResponseShape, two: &ResponseShape| (one.matches_across_requests(two), two.matches_across_requests(one));
        let (error, with_list) = (r#"{"error":{"message":"unknown key"}}"#, r#"{"error":{"message":"unknown key"},"data":[]}"#);
        assert_eq!(same(&shape(200, error), &shape(200, with_list)), (true, true));
        assert_eq!(same(&shape(200, error), &shape(400, with_list)), (false, false));
        let (model, route) = (r#"{"error":{"message":"unknown model"}}"#, r#"{"error":{"message":"unknown route"}}"#);
        assert_eq!(same(&shape(400, model), &shape(400, route)), (false, false));
        assert_eq!(same(&shape(403, ""), &shape(403, "listing is disabled")), (false, false));
    }

    #[test]
    fn a_code_and_a_language_without_blanks_are_compared() {
        for name in ["errcode", "errno", "err", "error_code"] {
            let body = |number: &str| format!(r#"{{"{name}":{number},"m":"x"}}"#);
            check_alike(false, (400, &body("40001"), "made-up-key-one"), (400, &body("40035"), "made-up-key-two"));
        }
        check_alike(false, (400, "<Code>40001</Code>", "made-up-key-one"), (400, "<Code>40035</Code>", "made-up-key-two"));
        let (stream, token) =
            ("仅支持流式输出，请在请求中将参数设置为真之后再试一次", "无效的令牌，请检查您的密钥是否正确并重新提交一次请求");
        check_alike(false, (400, stream, "made-up-key-one"), (400, token, "made-up-key-two"));
        check_alike(true, (400, token, "made-up-key-one"), (400, token, "made-up-key-two"));
        // A key that is masked with a character beyond ASCII is recognised too.
        let masked = |tail: &str| format!("unknown key sk-ab\u{2026}{tail}");
        check_alike(true, (401, &masked("wxyz"), "made-up-key-one"), (401, &masked("qrst"), "made-up-key-two"));
    }

    #[test]
    fn a_long_body_is_compared_up_to_a_limit() {
        let words = |first: usize, count| (first..first + count).map(|word| "k".repeat(word % 20 + 8)).collect::<Vec<_>>();
        let body = |tail: &str| [words(0, 100), vec![tail.to_owned(); 50]].concat().join(" ");
        check_alike(false, (401, &body("unknown"), "made-up-key-one"), (401, &body("locked"), "made-up-key-two"));
        let long = "\u{4ee4}\u{724c}\u{65e0} ".repeat(1000);
        assert_eq!(shape(401, &long, false, "made-up-key-one").words.len(), 2 * MAX_WORDS);
    }

    #[test]
    fn another_answer_is_another() {
        check_alike(false, (401, "APIKEY is invalid", "made-up-key-one"), (401, "APIKEY is missing", "made-up-key-two"));
        check_alike(false, (401, "no", "made-up-key-one"), (403, "no", "made-up-key-two"));
        check_alike(false, (401, "no", "made-up-key-one"), (401, "", "made-up-key-two"));
        check_alike(
            false,
            (401, r#"{"error":{"code":"a"}}"#, "made-up-key-one"),
            (401, r#"{"error":{"code":"b"}}"#, "made-up-key-two"),
        );
        check_alike(
            false,
            (200, r#"{"code":500,"data":null}"#, "made-up-key-one"),
            (200, r#"{"code":401,"data":null}"#, "made-up-key-two"),
        );
        check_alike(false, (401, r#""unauthorized""#, "made-up-key-one"), (401, "unauthorized", "made-up-key-two"));
        let (page, text) =
            (shape(401, "unauthorized", true, "made-up-key-one"), shape(401, "unauthorized", false, "made-up-key-one"));
        assert!(!page.is_like(&text), "a page is not a text of the same words");
        let (login, block) = ("<html>please sign in to go on</html>", "<html>this site is blocked by policy</html>");
        check_alike(false, (200, login, "made-up-key-one"), (200, block, "made-up-key-two"));
    }
}
