//! Reads YAML documents: size, encoding, syntax and schema, each problem with its line. The only file that uses the YAML crate.

use std::{cell::Cell, collections::BTreeMap, fmt, marker::PhantomData, sync::Arc};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, DeserializeSeed, EnumAccess, IgnoredAny, MapAccess, SeqAccess, VariantAccess, Visitor},
};

use crate::domain::problem::{Loaded, Problem};

/// The largest document that is read. The platform's own registry has less than 40 KB, so a file of this size is a mistake.
pub(crate) const MAX_DOCUMENT_BYTES: usize = 1024 * 1024;
/// What is said of an unknown key in a document that is in force all the same.
pub(crate) const IGNORED: &str = "; it was ignored";
/// How many bytes may be parsed again to describe the problems of a document. Each line that is looked up, and each part that is read alone, costs
/// one pass. Enough for 200 passes over the platform's registry; takes a second at most.
const REPARSE_BYTES: usize = 8 * 1024 * 1024;

/// Parses a document. Keys that are not in the schema become warnings.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<Loaded<T>, Problem> {
    let text = bounded_text_of(bytes)?;
    let mut warnings = Vec::new();
    let value = serde_ignored::deserialize(serde_yaml::Deserializer::from_str(text), |path| {
        warnings.push(Problem::at(path_text(&path), format!("is not a key that this schema knows{IGNORED}")));
    })
    .map_err(|fault| to_problem(text, &fault))?;
    Ok(Loaded { value, warnings: with_lines(bytes, warnings) })
}

/// The names of a type's fields as documents write them.
pub(crate) fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    struct FieldNames<'f>(&'f mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for FieldNames<'_> {
        type Error = de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("only asked for its fields"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut fields: &'static [&'static str] = &[];
    // Always the error above: only the names of the fields are wanted.
    drop(T::deserialize(FieldNames(&mut fields)));
    fields
}

/// The problems in the order of the document, each with its line or the line of the nearest place around it.
pub(crate) fn with_lines(bytes: &[u8], mut problems: Vec<Problem>) -> Vec<Problem> {
    let Ok(text) = text_of(bytes) else { return problems };
    let affordable = REPARSE_BYTES / text.len().max(1);
    // Many problems may have one place: it is looked up once.
    let mut lines: BTreeMap<String, Option<usize>> = BTreeMap::new();
    for problem in problems.iter_mut().filter(|problem| problem.line.is_none() && !problem.place.is_empty()) {
        problem.line = match lines.get(&problem.place) {
            Some(line) => *line,
            None if lines.len() < affordable => {
                let line = line_of(text, &problem.place);
                lines.insert(problem.place.clone(), line);
                line
            }
            None => None,
        };
    }
    problems.sort_by_key(|problem| problem.line.unwrap_or(0));
    problems
}

/// Reads parts of a document one by one, so that a problem in one part does not hide those in others.
pub(crate) struct Parts<'t> {
    text: &'t str,
    left: usize,
}

impl<'t> Parts<'t> {
    /// The parts of this document, if it is text.
    pub(crate) fn of(bytes: &'t [u8]) -> Option<Self> {
        let text = bounded_text_of(bytes).ok()?;
        Some(Self { text, left: REPARSE_BYTES / text.len().max(1) })
    }

    /// The value at a path such as `providers[3]`. `None` if there is none, or if too much has been read already.
    pub(crate) fn read<T: DeserializeOwned>(&mut self, path: &str) -> Result<Option<T>, Problem> {
        self.left = match self.left.checked_sub(1) {
            Some(left) => left,
            None => return Ok(None),
        };
        let walk = Walk { path, end: PhantomData::<T> };
        walk.deserialize(serde_yaml::Deserializer::from_str(self.text)).map_err(|fault| to_problem(self.text, &fault))
    }

    /// Whether this many parts can still be read.
    pub(crate) fn can_read(&self, parts: usize) -> bool {
        parts <= self.left
    }
}

/// Deserializes a map. A key that appears twice is an error; serde's own maps would keep the last value.
pub(crate) fn unique_keys<'de, D, V>(deserializer: D) -> Result<Option<BTreeMap<String, V>>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    struct Unique<V>(BTreeMap<String, V>);

    impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Names<V>(PhantomData<V>);

            impl<'de, V: Deserialize<'de>> Visitor<'de> for Names<V> {
                type Value = BTreeMap<String, V>;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a map")
                }

                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                    let mut values = BTreeMap::new();
                    while let Some(key) = map.next_key::<String>()? {
                        if values.contains_key(&key) {
                            return Err(de::Error::custom(format_args!("duplicate key `{key}`")));
                        }
                        let value = map.next_value()?;
                        values.insert(key, value);
                    }
                    Ok(values)
                }
            }

            deserializer.deserialize_map(Names(PhantomData)).map(Self)
        }
    }

    Ok(Option::<Unique<V>>::deserialize(deserializer)?.map(|unique| unique.0))
}

fn text_of(bytes: &[u8]) -> Result<&str, Problem> {
    if bytes.len() > MAX_DOCUMENT_BYTES {
        return Err(Problem::at("", format!("is {} bytes long; the limit is {MAX_DOCUMENT_BYTES}", bytes.len())));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|fault| Problem::at("", format!("is not UTF-8 (byte {}); save it as UTF-8", fault.valid_up_to())))?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// The same of a document whose values are read. It is refused if it is too large once each `*NAME` is replaced by what it stands for: the parser
/// limits how often that is done, not how much comes of it.
fn bounded_text_of(bytes: &[u8]) -> Result<&str, Problem> {
    let text = text_of(bytes)?;
    if !(text.contains('&') && text.contains('*')) {
        return Ok(text);
    }
    let left = Cell::new(Some(MAX_DOCUMENT_BYTES));
    // What else is wrong is said by the one who reads it.
    drop(Whole(&left).deserialize(serde_yaml::Deserializer::from_str(text)));
    match left.get() {
        Some(_) => Ok(text),
        None => {
            let message = format!("is longer than {MAX_DOCUMENT_BYTES} bytes once its aliases (`*NAME`) are replaced; use fewer");
            Err(Problem::at("", message))
        }
    }
}

/// Reads everything, and takes the length of each text from what is left; `None` if that is not enough.
#[derive(Clone, Copy)]
struct Whole<'c>(&'c Cell<Option<usize>>);

impl Whole<'_> {
    fn take<E: de::Error>(self, bytes: usize) -> Result<(), E> {
        // In a document each value has something behind it, so one without aliases is never too long.
        self.0.set(self.0.get().and_then(|left| left.checked_sub(bytes + 1)));
        if self.0.get().is_none() { Err(E::custom("too long")) } else { Ok(()) }
    }
}

impl<'de> DeserializeSeed<'de> for Whole<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Whole<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.take(0)?;
        while map.next_key_seed(self)?.is_some() {
            map.next_value_seed(self)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        self.take(0)?;
        while seq.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    /// A value with a tag.
    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<(), A::Error> {
        data.variant_seed(self)?.1.newtype_variant_seed(self)
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
        self.take(0)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_i128<E: de::Error>(self, _: i128) -> Result<(), E> {
        self.take(0)
    }

    fn visit_u128<E: de::Error>(self, _: u128) -> Result<(), E> {
        self.take(0)
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        self.take(text.len())
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.take(0)
    }
}

/// A short hash of a document, by which people and replicas tell its versions apart.
pub(crate) fn revision(bytes: &[u8]) -> Arc<str> {
    blake3::hash(bytes).to_hex().chars().take(16).collect::<String>().into()
}

/// Splits the parser's error into place, line and message.
fn to_problem(text: &str, fault: &serde_yaml::Error) -> Problem {
    let whole = fault.to_string();
    let message = whole.rsplit_once(" at line ").map_or(whole.as_str(), |(message, _)| message);
    let (place, message) = match message.split_once(": ") {
        Some((place, rest)) if !place.contains([' ', '`']) => (place, rest),
        _ => ("", message),
    };
    let line = fault.location().map(|at| at.line());
    if let Some(key) = repeated_key(message) {
        // The parser's line is that of the whole map.
        let line = line_of_second(text, place, key).or(line);
        let place = if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
        return Problem { line, ..Problem::at(place, "this key appears twice; remove one") };
    }
    Problem { line, ..Problem::at(place, format!("parse manifest: {message}")) }
}

/// The key that appears twice, if that is the fault. The parser says it in one way, derived schemas in another, and `unique_keys` in a third.
fn repeated_key(message: &str) -> Option<&str> {
    let quoted = |start: &str, mark: char| message.strip_prefix(start)?.strip_prefix(mark)?.strip_suffix(mark);
    quoted("duplicate field ", '`').or_else(|| quoted("duplicate key ", '`')).or_else(|| quoted("duplicate entry with key ", '"'))
}

/// The line where this key appears for the second time in the map at this path.
fn line_of_second(text: &str, path: &str, key: &str) -> Option<usize> {
    let walk = Walk { path, end: FailAtSecond { key } };
    let fault = walk.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
    fault.location().map(|at| at.line())
}

/// Fails at the second key of this name, so that the error's location is that key.
#[derive(Clone, Copy)]
struct FailAtSecond<'k> {
    key: &'k str,
}

impl<'de> DeserializeSeed<'de> for FailAtSecond<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FailAtSecond<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut is_second = false;
        while let Some(is_it) = map.next_key_seed(KeyOf { key: self.key, fails: is_second })? {
            is_second |= is_it;
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// Whether a key has this name; fails at once instead, if wanted.
struct KeyOf<'k> {
    key: &'k str,
    fails: bool,
}

impl<'de> DeserializeSeed<'de> for KeyOf<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyOf<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<bool, E> {
        if self.fails && name == self.key { Err(E::custom("the second")) } else { Ok(name == self.key) }
    }
}

/// A path as problems show it: `providers[3].probe[0].headers`.
fn path_text(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", path_text(parent)),
        Path::Map { parent, key } => {
            let parent = path_text(parent);
            if parent.is_empty() { key.clone() } else { format!("{parent}.{key}") }
        }
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => path_text(parent),
    }
}

/// The line of a path, or of the nearest place around it. The parser gives lines only in errors, so the walk to the path ends in an error.
fn line_of(text: &str, path: &str) -> Option<usize> {
    let mut path = path;
    loop {
        let walk = Walk { path, end: FailHere };
        match walk.deserialize(serde_yaml::Deserializer::from_str(text)) {
            Err(fault) => return fault.location().map(|at| at.line()),
            Ok(_) => path = path.rfind(['.', '[']).and_then(|end| path.get(..end))?,
        }
    }
}

/// Walks to a path and deserializes what is there with `end`. Everything else is skipped.
struct Walk<'p, S> {
    path: &'p str,
    end: S,
}

/// Fails at once, so that the error's location is the place that was reached.
#[derive(Clone, Copy)]
struct FailHere;

impl<'de, S: DeserializeSeed<'de> + Copy> DeserializeSeed<'de> for Walk<'_, S> {
    type Value = Option<S::Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.path.is_empty() { self.end.deserialize(deserializer).map(Some) } else { deserializer.deserialize_any(self) }
    }
}

impl<'de, S: DeserializeSeed<'de> + Copy> Visitor<'de> for Walk<'_, S> {
    type Value = Option<S::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            let rest = self.path.strip_prefix(key.as_str()).and_then(|rest| match rest.chars().next() {
                Some('.') => rest.get(1..),
                Some('[') | None => Some(rest),
                Some(_) => None,
            });
            match rest {
                Some(path) if found.is_none() => found = map.next_value_seed(Walk { path, end: self.end })?,
                Some(_) | None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let step = self.path.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let step = step.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest.strip_prefix('.').unwrap_or(rest))));
        let (mut at, mut found) = (0_usize, None);
        loop {
            match step {
                Some((index, path)) if index == at => match seq.next_element_seed(Walk { path, end: self.end })? {
                    Some(value) => found = value,
                    None => return Ok(found),
                },
                _ => {
                    if seq.next_element::<IgnoredAny>()?.is_none() {
                        return Ok(found);
                    }
                }
            }
            at += 1;
        }
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

impl<'de> DeserializeSeed<'de> for FailHere {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        struct Here;

        impl<'de> Visitor<'de> for Here {
            type Value = ();

            // Every `visit_*` method that is left out returns an error, as wanted.
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("nothing")
            }
        }

        deserializer.deserialize_any(Here)
    }
}

/// Parses a document without a schema. An empty document is null; a key that appears twice is an error.
pub(crate) fn tree(bytes: &[u8]) -> Result<serde_json::Value, Problem> {
    let value = parse::<serde_yaml::Value>(bytes)?.value;
    serde_json::to_value(value).map_err(|fault| Problem::at("", format!("parse manifest: {fault}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Doc {
        name: String,
        #[serde(default, deserialize_with = "unique_keys")]
        by_name: Option<BTreeMap<String, String>>,
    }

    #[test]
    fn a_byte_order_mark_and_carriage_returns_are_accepted() {
        assert_eq!(parse::<Doc>("\u{feff}name: a\r\n".as_bytes()).unwrap().value.name, "a");
    }

    #[test]
    fn unknown_keys_are_warnings_with_their_path_and_line() {
        let loaded = parse::<Doc>(b"name: a\nnmae:\n  b\n").unwrap();
        let unknown = Problem::at("nmae", "is not a key that this schema knows; it was ignored");
        assert_eq!(loaded.warnings, [Problem { line: Some(3), ..unknown }]);
    }

    #[test]
    fn faults_say_where() {
        let place = |bytes: &[u8]| parse::<Doc>(bytes).unwrap_err().to_string();
        assert!(place(b"name: [").contains("line "), "{}", place(b"name: ["));
        assert!(place(b"name: \xff").contains("not UTF-8"));
        assert!(place(&vec![b' '; MAX_DOCUMENT_BYTES + 1]).contains("limit"));
        assert_eq!(place(b"name: a\nname: b\n"), "line 2: name: this key appears twice; remove one");
        let map = b"name: a\nby_name:\n  x: a\n  y: a\n  x:\n    a\n";
        assert_eq!(place(map), "line 5: by_name.x: this key appears twice; remove one");
        let bare = tree(b"a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n").unwrap_err();
        assert_eq!(bare.to_string(), "line 5: b.c: this key appears twice; remove one");
        assert_eq!(place(b"\nname:\n  [a]\n"), "line 3: name: parse manifest: invalid type: sequence, expected a string");
    }

    /// What aliases stand for counts as if it were written out, under any key and tag.
    #[test]
    fn aliases_make_no_document_longer_than_the_limit() {
        let long = "x".repeat(MAX_DOCUMENT_BYTES / 8);
        let with = |aliases: usize| {
            let list = "\n  - *long".repeat(aliases);
            format!(
                "name: a\nlong: &long [!tag {{k: [1, -1, {}, -{0}, 1.5, true, null, ~, !, !x , {long}]}}]\nlist:{list}\n",
                u128::MAX / 4
            )
        };
        let refused = |document: &str| parse::<Doc>(document.as_bytes()).err().map(|problem| problem.to_string());
        assert_eq!(refused(&with(6)), None);
        let said = refused(&with(8)).unwrap();
        assert!(said.contains("is longer than 1048576 bytes once its aliases (`*NAME`) are replaced"), "{said}");
        assert!(Parts::of(with(8).as_bytes()).is_none());
        // Each alias of a long list of short values.
        let many = format!("name: a\nmany: &many [{}]\nlist:{}", "1,".repeat(30_000), "\n  - *many".repeat(60));
        assert!(refused(&many).is_some());
        // One that is nearly as long as it may be, and has none.
        let plain = format!("name: a # & *\nlist: [{}1]\n", "1,".repeat(MAX_DOCUMENT_BYTES / 2 - 20));
        assert_eq!(refused(&plain), None);
    }

    #[test]
    fn lines_of_paths() {
        let text = "a:\n  b.c:\n    - x: 1\n    - y: [1,\n          2]\n  b: 5\n";
        let line = |path: &str| line_of(text, path);
        assert_eq!(line("a"), Some(2));
        assert_eq!(line("a.b.c"), Some(3));
        assert_eq!(line("a.b.c[0].x"), Some(3));
        assert_eq!(line("a.b.c[1].y[1]"), Some(5));
        assert_eq!(line("a.b"), Some(6));
        assert_eq!(line("a.b.c[1].z"), Some(4), "not there: the nearest place around it");
        assert_eq!(line("a.b.c[7]"), Some(3));
        assert_eq!(line("nowhere"), None);
    }

    #[test]
    fn parts_are_read_by_themselves() {
        let mut parts = Parts::of(b"list:\n  - {name: a}\n  - {name: [b]}\n").unwrap();
        assert_eq!(parts.read::<Doc>("list[0]").unwrap().unwrap().name, "a");
        assert_eq!(parts.read::<Doc>("list[1]").unwrap_err().line, Some(3));
        assert!(parts.read::<Doc>("list[2]").unwrap().is_none());
    }
}
