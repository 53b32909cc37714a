//! Rules about the source itself: what may import what, what must be said, and that nothing lies about unused.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use byok_gate::domain::decision::DenyCode;

/// The layers of `src/`, lowest first: a folder imports from those below it.
const LAYERS: [&str; 9] = ["domain", "core", "telemetry", "watch", "liveness", "config", "grpc", "server", "cli"];

/// What a pure module has no use for: a clock, the environment, files, the network, a log, tasks.
const EFFECTS: [&str; 12] = [
    "tokio::",
    "reqwest",
    "hyper",
    "tracing",
    "std::fs",
    "std::env",
    "std::net::T",
    "std::net::U",
    "SystemTime::now",
    "Instant::now",
    "async fn",
    "rand::",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// Every Rust file below a folder, by its path from there.
fn rust_files(folder: &str) -> Vec<String> {
    fn walk(folder: &Path, base: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, base, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(base).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    let base = root().join(folder);
    let mut found = Vec::new();
    walk(&base, &base, &mut found);
    found.sort();
    found
}

/// The code of a file without its unit tests, which may use anything.
fn code(file: &str) -> String {
    let text = read(Path::new("src").join(file));
    text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned()
}

fn top_module(file: &str) -> &str {
    file.trim_end_matches(".rs").split('/').next().unwrap()
}

fn layer(module: &str) -> usize {
    LAYERS.iter().position(|layer| *layer == module).unwrap_or_else(|| panic!("`{module}` is in no layer"))
}

/// The modules that a file imports from this crate.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut add = |text: &str| {
        let name: String = text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
        if !name.is_empty() {
            found.insert(name);
        }
    };
    for (at, _) in code.match_indices("crate::") {
        // `#crate` of a macro and `pub(crate)` have no `::` behind them.
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => add(rest),
            Some(list) => {
                let mut depth = 0;
                let mut word = String::new();
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => add(std::mem::take(&mut word).trim()),
                        _ if depth == 0 => word.push(c),
                        _ => {}
                    }
                }
                add(word.trim());
            }
        }
    }
    found
}

#[test]
fn imports_go_down_only() {
    for file in rust_files("src") {
        let module = top_module(&file);
        if module == "lib" || module == "main" {
            continue;
        }
        for import in imports(&code(&file)) {
            assert!(layer(&import) <= layer(module), "src/{file} imports `{import}` from a layer above");
        }
    }
}

#[test]
fn the_core_is_pure() {
    for file in rust_files("src") {
        let module = top_module(&file);
        // The engine awaits the one effect that a decision has, through a trait of its own.
        if !matches!(module, "domain" | "core") || file == "core/engine.rs" {
            continue;
        }
        let code = code(&file);
        for effect in EFFECTS {
            assert!(!code.contains(effect), "src/{file} uses `{effect}`");
        }
    }
}

#[test]
fn each_format_has_one_door() {
    for file in rust_files("src") {
        let code = code(&file);
        assert!(!code.contains("serde_yaml") || file == "core/yaml.rs", "src/{file} names the YAML crate");
        let edge = file.starts_with("grpc") || file.starts_with("cli") || file.starts_with("server");
        assert!(!code.contains("pb::") || edge, "src/{file} names generated code");
    }
}

#[test]
fn every_file_is_reached_and_says_what_it_is() {
    for folder in ["src", "tests/it"] {
        let files = rust_files(folder);
        let declared: String = files.iter().map(|file| read(Path::new(folder).join(file))).collect();
        for file in &files {
            let text = read(Path::new(folder).join(file));
            assert!(text.starts_with("//!"), "{folder}/{file} does not say what it is");
            let stem = Path::new(file).file_stem().unwrap().to_str().unwrap();
            let name = if stem == "mod" { Path::new(file).parent().unwrap().to_str().unwrap() } else { stem };
            let root = matches!(name, "lib" | "main");
            assert!(root || declared.contains(&format!("mod {name};")), "{folder}/{file} is in no module");
        }
    }
}

/// Every deny code stands in the README with its meaning, and in the proto.
#[test]
fn every_deny_code_is_explained() {
    let (readme, proto) = (read("README.md"), read("proto/byokgate/v1/policy_decision.proto"));
    for code in DenyCode::ALL {
        assert!(readme.contains(&format!("| `{code}` |")), "README.md has no row for {code}");
        assert!(proto.contains(&format!("  DENY_CODE_{code} = ")), "the proto has no {code}");
    }
}

/// A lint is silenced with its reason, or not at all; nothing is left to do.
#[test]
fn nothing_is_left_undone() {
    for folder in ["src", "tests/it"] {
        for file in rust_files(folder) {
            let text = read(Path::new(folder).join(&file));
            for mark in [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("#[", "allow("), concat!("#[", "ignore")] {
                assert!(!text.contains(mark), "{folder}/{file} holds `{mark}`");
            }
        }
    }
}
