//! The one door for YAML: size, encoding, syntax and schema, each fault with its place. Names the YAML crate; no other file does.

use serde::de::DeserializeOwned;

use crate::problem::{Loaded, Problem};

/// The largest document that is read. The platform's own registry is under 40 KB; a file of this size is a mistake.
pub(crate) const MAX_DOCUMENT_BYTES: usize = 1024 * 1024;

/// Parses one document. Keys that the schema does not know are accepted and come back as warnings.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<Loaded<T>, Problem> {
    if bytes.len() > MAX_DOCUMENT_BYTES {
        return Err(Problem::at("", format!("is {} bytes long; the limit is {MAX_DOCUMENT_BYTES}", bytes.len())));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|fault| Problem::at("", format!("is not UTF-8 (byte {}); save it as UTF-8", fault.valid_up_to())))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut warnings = Vec::new();
    let value = serde_ignored::deserialize(serde_yaml::Deserializer::from_str(text), |path| {
        warnings.push(Problem::at(path.to_string(), "is not a key that this schema knows; it was ignored"));
    })
    .map_err(|fault: serde_yaml::Error| {
        let place = fault.location().map_or_else(String::new, |at| format!("line {}, column {}", at.line(), at.column()));
        Problem::at(place, format!("parse manifest: {fault}"))
    })?;
    Ok(Loaded { value, warnings })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Doc {
        name: String,
    }

    #[test]
    fn a_byte_order_mark_and_carriage_returns_are_accepted() {
        assert_eq!(parse::<Doc>("\u{feff}name: a\r\n".as_bytes()).unwrap().value, Doc { name: "a".into() });
    }

    #[test]
    fn unknown_keys_are_warnings_with_their_path() {
        let loaded = parse::<Doc>(b"name: a\nnmae: b\n").unwrap();
        assert_eq!(loaded.warnings, [Problem::at("nmae", "is not a key that this schema knows; it was ignored")]);
    }

    #[test]
    fn faults_say_where() {
        let place = |bytes: &[u8]| parse::<Doc>(bytes).unwrap_err().to_string();
        assert!(place(b"name: [").contains("line "), "{}", place(b"name: ["));
        assert!(place(b"name: \xff").contains("not UTF-8"));
        assert!(place(&vec![b' '; MAX_DOCUMENT_BYTES + 1]).contains("limit"));
        assert!(place(b"name: a\nname: b\n").contains("duplicate"));
    }
}
