//! Rewords serde's errors for the operator who wrote the value: serde names Rust's types.

use serde_json::Value;

const LENGTH: &str = "a length of time such as 250ms, 30s or 5m";

/// Rewords an error of serde about this value. An unknown error stays as it is.
pub(super) fn plainly(fault: &str, value: &Value) -> String {
    let is_whole = match fault {
        _ if value.is_array() => fault.contains(": sequence, "),
        _ if value.is_object() => fault.contains(": map, "),
        _ => true,
    };
    let is = if is_whole { "is" } else { "holds" };
    if fault.contains("duration format") {
        return format!("is `{}`; it must be {LENGTH}", text_of(value));
    }
    if let Some((found, known)) = after(fault, "unknown variant ") {
        return format!("{is} {found}; it must be {}", one_of(known));
    }
    if let Some((found, known)) = after(fault, "unknown field ") {
        return format!("holds the key {found}, which is not known there; it takes {}", known.trim_start_matches("one of "));
    }
    if let Some(key) = fault.strip_prefix("missing field ") {
        return format!("misses the key {key}");
    }
    let of_value = after(fault, "invalid type: ").or_else(|| after(fault, "invalid value: "));
    of_value
        .map_or_else(|| fault.to_owned(), |(found, wanted)| format!("{is} {}; it must be {}", found_as(found), wanted_as(wanted)))
}

/// What was found and what was expected, behind this beginning.
fn after<'f>(fault: &'f str, begin: &str) -> Option<(&'f str, &'f str)> {
    fault.strip_prefix(begin)?.rsplit_once(", expected ").or_else(|| fault.strip_prefix(begin)?.split_once(", expected "))
}

fn one_of(known: &str) -> String {
    let list = known.trim_start_matches("one of ");
    match list.rsplit_once(", ") {
        Some((first, last)) => format!("{first} or {last}"),
        None => list.to_owned(),
    }
}

fn found_as(found: &str) -> String {
    match found {
        "null" => "empty".to_owned(),
        "sequence" => "a list".to_owned(),
        "map" => "a section of keys".to_owned(),
        _ => {
            let text = found.strip_prefix("string \"").and_then(|rest| rest.strip_suffix('"'));
            let number = ["integer ", "floating point ", "boolean "].iter().find_map(|kind| found.strip_prefix(kind));
            text.map(|text| format!("the text `{text}`")).or(number.map(str::to_owned)).unwrap_or_else(|| found.to_owned())
        }
    }
}

fn wanted_as(wanted: &str) -> &str {
    match wanted {
        "usize" | "u8" | "u16" | "u32" | "u64" => "a whole number of 0 or more",
        "a nonzero u32" | "a nonzero usize" => "a whole number of at least 1",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list, such as [a, b]",
        "a string" => "a text",
        "path string" => "a path",
        "an unsigned duration string" => LENGTH,
        "a map" => "a section of keys",
        _ if wanted.starts_with("struct ") => "a section of keys",
        _ => wanted,
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use crate::core::yaml;

    /// Each kind of error that serde has for these settings.
    #[test]
    fn a_value_that_does_not_fit_is_told_without_the_librarys_words() {
        for (text, expect) in [
            ("cache: {valid: soon}", "cache.valid: is `soon`; it must be a length of time such as 250ms, 30s or 5m"),
            ("cache: {valid: -5s}", "cache.valid: is `-5s`; it must be a length of time such as 250ms, 30s or 5m"),
            ("cache: {valid: 5}", "cache.valid: is `5`; it must be a length of time such as 250ms, 30s or 5m"),
            ("limits: {decisions: many}", "limits.decisions: is the text `many`; it must be a whole number of 0 or more"),
            (
                "limits: {decisions: 'a, expected b'}",
                "limits.decisions: is the text `a, expected b`; it must be a whole number of 0 or more",
            ),
            ("limits: {decisions: -1}", "limits.decisions: is `-1`; it must be a whole number of 0 or more"),
            ("limits: {decisions: 1.5}", "limits.decisions: is `1.5`; it must be a whole number of 0 or more"),
            ("server: {replicas: 0}", "server.replicas: is `0`; it must be a whole number of at least 1"),
            ("log: {plain_allow_ratio: x}", "log.plain_allow_ratio: is the text `x`; it must be a number"),
            ("server: {insecure_listen: 1}", "server.insecure_listen: is `1`; it must be true or false"),
            ("server: {listen: 5}", "server.listen: is `5`; it must be a list, such as [a, b]"),
            ("server: {listen: null}", "server.listen: is empty; it must be a list, such as [a, b]"),
            ("server: {listen: [1]}", "server.listen: holds `1`; it must be a text"),
            ("admin: {listen: [a]}", "admin.listen: is a list; it must be a text"),
            ("tls: {certificate: [1]}", "tls.certificate: is a list; it must be a path"),
            ("exempt_runtimes: {a: b}", "exempt_runtimes: is a section of keys; it must be a list, such as [a, b]"),
            ("platform_proxy: maybe", "platform_proxy: is `maybe`; it must be `available` or `absent`"),
            (
                "policy: {create: {inconclusive: denyy}}",
                "policy.create.inconclusive: is `denyy`; it must be `allow`, `allow-if-recently-valid` or `deny`",
            ),
            (
                "callers: {certificates: nobody}",
                "callers.certificates: is the text `nobody`; it must be a list of callers, or the word `anyone`",
            ),
            (
                "callers: {certificates: [{sam: x}]}",
                "callers.certificates: holds the key `sam`, which is not known there; it takes `san`, `role`, `workspaces`",
            ),
            (
                "callers: {certificates: [{san: a, role: x}]}",
                "callers.certificates: holds `x`; it must be `platform`, `workspace` or `operator`",
            ),
            ("callers: {unix_peers: [5]}", "callers.unix_peers: holds `5`; it must be a section of keys"),
            ("providers: {acme: {}}", "providers.acme: misses the key `probe`"),
        ] {
            let mut layers = super::super::layers::Layers::new();
            layers.file("f", yaml::tree(text.as_bytes()).unwrap());
            let problems: Vec<String> = layers.finish().problems.iter().map(ToString::to_string).collect();
            assert_eq!(problems, [format!("{expect} (from file f)")], "{text}");
        }
    }
}
