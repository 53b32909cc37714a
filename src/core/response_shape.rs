//! What an answer looks like, so that two of them can be compared: is this what a made-up key gets?
//!
//! Two answers look alike if their status, the kind of their body and their error code are the same, and of their words no more than one in
//! eight differs. What differs from answer to answer by nature is taken out before: words with a digit (ids, times, counts), words
//! without end, keys that are echoed whole or masked.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::answer::{Answer, Body};

/// So much of a body is looked at.
const MAX_BYTES: usize = 16 * 1024;
/// So many words are compared.
const MAX_WORDS: usize = 256;
/// Of so many words one may differ.
const ONE_IN: usize = 8;
/// Of so many words one may come on top where two kinds of request are compared.
const ONE_IN_MORE: usize = 4;
/// A longer word is an id, a token, or a key.
const MAX_WORD: usize = 32;
/// An error's code is no longer.
const MAX_CODE: usize = 8;
/// A shorter key, or part of one, is a word by chance.
const MIN_ECHO: usize = 8;

/// What an answer looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseShape {
    /// Its status.
    pub status: u16,
    /// The kind of its body.
    pub body: Body,
    /// Its error code, if it has one.
    pub code: String,
    /// The hashes of its words, sorted.
    words: Vec<u64>,
}

impl ResponseShape {
    /// What this answer to a request with this credential looks like.
    pub fn of(answer: Answer<'_>, credential: &str) -> Self {
        let (body, code) = answer.body_and_code();
        let text = String::from_utf8_lossy(answer.body.get(..MAX_BYTES).unwrap_or(answer.body)).to_lowercase();
        let credential = credential.to_lowercase();
        let words = text.split(|c: char| c.is_whitespace() || "\"'`{}[]()<>,:;=&".contains(c));
        let words = words.map(|word| word.trim_matches(|c: char| ".!?/".contains(c))).filter(|word| !word.is_empty());
        let mut hashes: Vec<u64> = Vec::new();
        let mut before = "";
        for word in words.take(MAX_WORDS) {
            // A number behind the name of a code is one, and no id.
            let is_code = names_a_code(before) && word.len() <= MAX_CODE;
            if is_of_a_key(word, &credential) || word.is_ascii() && !is_code && is_an_id(word) {
                hashes.push(hash("#"));
            } else if word.is_ascii() {
                hashes.push(hash(word));
            } else {
                // Not every language has blanks between its words.
                hashes.extend(word.chars().take(MAX_WORDS).map(|character| hash(character.encode_utf8(&mut [0; 4]))));
            }
            before = word;
        }
        hashes.truncate(2 * MAX_WORDS);
        hashes.sort_unstable();
        Self { status: answer.status, body, code, words: hashes }
    }

    /// About the same answer.
    pub fn is_like(&self, other: &Self) -> bool {
        let (mine, others) = self.own_words(other);
        self.is_of_one_kind(other) && mine.max(others) <= self.words.len().max(other.words.len()) / ONE_IN
    }

    /// The same answer to another kind of request: about the same, or with one word in four more, as an empty list beside the error has.
    pub fn matches_across_requests(&self, other: &Self) -> bool {
        let (mine, others) = self.own_words(other);
        let more = mine.min(others) == 0 && mine.max(others) <= self.words.len().max(other.words.len()).div_ceil(ONE_IN_MORE);
        self.is_like(other) || more && self.is_of_one_kind(other)
    }

    fn is_of_one_kind(&self, other: &Self) -> bool {
        self.status == other.status && self.body == other.body && self.code == other.code
    }

    /// How many words only this one has, and how many only the other.
    fn own_words(&self, other: &Self) -> (usize, usize) {
        let (mut one, mut two) = (self.words.iter().peekable(), other.words.iter().peekable());
        let (mut only_one, mut only_two) = (0, 0);
        loop {
            match (one.peek(), two.peek()) {
                (Some(left), Some(right)) if left == right => {
                    one.next();
                    two.next();
                }
                (Some(left), Some(right)) if left < right => {
                    one.next();
                    only_one += 1;
                }
                (_, Some(_)) => {
                    two.next();
                    only_two += 1;
                }
                (Some(_), None) => {
                    one.next();
                    only_one += 1;
                }
                (None, None) => return (only_one, only_two),
            }
        }
    }
}

/// How members are called that hold an error's code.
fn names_a_code(name: &str) -> bool {
    name.ends_with("code") || name.ends_with("errno") || matches!(name, "err" | "error" | "ret" | "status")
}

/// A key, masked or echoed: another one in each answer.
fn is_of_a_key(word: &str, credential: &str) -> bool {
    let masked = word.contains("**") || word.contains("...") || word.contains('…');
    let echoed =
        credential.len() >= MIN_ECHO && (word.contains(credential) || word.len() >= MIN_ECHO && credential.contains(word));
    masked || echoed
}

/// An id, a time or a count: likewise.
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
    fn alike(expected: bool, one: (u16, &str, &str), two: (u16, &str, &str)) {
        let (one, two) = (shape(one.0, one.1, false, one.2), shape(two.0, two.1, false, two.2));
        assert_eq!((one.is_like(&two), two.is_like(&one)), (expected, expected), "{one:?} {two:?}");
    }

    #[test]
    fn what_varies_by_nature_makes_no_difference() {
        alike(true, (401, "", "made-up-key-one"), (401, "  ", "made-up-key-two"));
        alike(
            true,
            (401, "Unauthorized (req_9f3a1c, 12:07:44)", "made-up-key-one"),
            (401, "Unauthorized (req_0b77de, 12:08:01)", "made-up-key-two"),
        );
        alike(true, (401, "key tenant-one is unknown", "tenant-one"), (401, "key sk-made-up is unknown", "sk-made-up"));
        let masked =
            |tail: &str| format!(r#"{{"error":{{"message":"Incorrect API key provided: sk-ab***{tail}.","code":"x"}}}}"#);
        alike(true, (401, &masked("wxyz"), "made-up-key-one"), (401, &masked("qrst"), "made-up-key-two"));
        let with_id =
            |id: &str| format!(r#"{{"type":"error","error":{{"type":"x","message":"no such key"}},"request_id":"{id}"}}"#);
        alike(true, (400, &with_id("reqabcdefgh"), "made-up-key-one"), (400, &with_id("reqijklmnop"), "made-up-key-two"));
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
            alike(false, (400, &body("40001"), "made-up-key-one"), (400, &body("40035"), "made-up-key-two"));
        }
        alike(false, (400, "<Code>40001</Code>", "made-up-key-one"), (400, "<Code>40035</Code>", "made-up-key-two"));
        let (stream, token) =
            ("仅支持流式输出，请在请求中将参数设置为真之后再试一次", "无效的令牌，请检查您的密钥是否正确并重新提交一次请求");
        alike(false, (400, stream, "made-up-key-one"), (400, token, "made-up-key-two"));
        alike(true, (400, token, "made-up-key-one"), (400, token, "made-up-key-two"));
        // A key that is masked with a sign beyond ASCII is a key all the same.
        let masked = |tail: &str| format!("unknown key sk-ab\u{2026}{tail}");
        alike(true, (401, &masked("wxyz"), "made-up-key-one"), (401, &masked("qrst"), "made-up-key-two"));
    }

    #[test]
    fn another_answer_is_another() {
        alike(false, (401, "APIKEY is invalid", "made-up-key-one"), (401, "APIKEY is missing", "made-up-key-two"));
        alike(false, (401, "no", "made-up-key-one"), (403, "no", "made-up-key-two"));
        alike(false, (401, "no", "made-up-key-one"), (401, "", "made-up-key-two"));
        alike(
            false,
            (401, r#"{"error":{"code":"a"}}"#, "made-up-key-one"),
            (401, r#"{"error":{"code":"b"}}"#, "made-up-key-two"),
        );
        alike(
            false,
            (200, r#"{"code":500,"data":null}"#, "made-up-key-one"),
            (200, r#"{"code":401,"data":null}"#, "made-up-key-two"),
        );
        alike(false, (401, r#""unauthorized""#, "made-up-key-one"), (401, "unauthorized", "made-up-key-two"));
        let (page, text) =
            (shape(401, "unauthorized", true, "made-up-key-one"), shape(401, "unauthorized", false, "made-up-key-one"));
        assert!(!page.is_like(&text), "a page is not a text of the same words");
        let (login, block) = ("<html>please sign in to go on</html>", "<html>this site is blocked by policy</html>");
        alike(false, (200, login, "made-up-key-one"), (200, block, "made-up-key-two"));
    }
}
