//! Rules about the source itself: what may import what, what must be documented, and that nothing is unused.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};
use strum::VariantArray;

use byok_gate::domain::verdict::DenyCode;

/// The layers of `src/`, lowest first: a folder imports from those below it.
const LAYERS: [&str; 10] = ["domain", "core", "telemetry", "watch", "liveness", "grpc", "server", "config", "app", "cli"];
/// The maximum number of floors of `src/`: the longest chain of imports between its modules.
const MAX_FLOORS: usize = 10;

/// What a pure module must not use: a clock, the environment, files, the network, a log, tasks.
const EFFECTS: [&str; 8] = ["tokio::", "reqwest", "hyper", "tracing", "SystemTime::now", "Instant::now", "async fn", "rand::"];

/// The same for the standard library, by path, since imports are nested.
const STD_EFFECTS: [&str; 8] = ["fs", "env", "process", "thread", "io::std", "net::Tcp", "net::Udp", "os::unix"];

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
    file.trim_end_matches(".rs").split(['/', ':']).next().unwrap()
}

fn layer(module: &str) -> usize {
    LAYERS.iter().position(|layer| *layer == module).unwrap_or_else(|| panic!("`{module}` is in no layer"))
}

/// A module by its folder and file: `core::engine`, `server`. A folder below a file is part of that file.
fn module_of(file: &str) -> String {
    let parts: Vec<&str> = file.trim_end_matches(".rs").split('/').take(2).collect();
    parts.join("::")
}

/// The paths that some code imports from this crate, such as `core::engine::Engine`, after `crate::` or `super::`.
fn imports(file: &str, code: &str) -> BTreeSet<String> {
    let folders: Vec<&str> = file.trim_end_matches(".rs").split('/').collect();
    let mut found = BTreeSet::new();
    for (word, base) in [
        ("crate::", String::new()),
        ("self::", format!("{}::", folders.join("::"))),
        ("super::", folders[..folders.len() - 1].iter().map(|folder| format!("{folder}::")).collect()),
    ] {
        for (at, _) in code.match_indices(word) {
            // `pub(crate)` and `#crate` have no `::` behind them; a longer word may end like this one.
            let before = code[..at].chars().next_back();
            if before.is_none_or(|before| !before.is_alphanumeric() && before != '_' && before != ':') {
                leaves(&code[at + word.len()..], &base, &mut found);
            }
        }
    }
    // A file that declares `mod tls;` reaches it as `tls::` too.
    for line in code.lines() {
        let declared = line.trim_start_matches("pub(crate) ").trim_start_matches("pub ").strip_prefix("mod ");
        if let Some(name) = declared.and_then(|rest| rest.strip_suffix(';'))
            && code
                .match_indices(&format!("{name}::"))
                .any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || "_:".contains(c)))
        {
            found.insert(format!("{}::{name}", folders.join("::")));
        }
    }
    found
}

/// The paths that some code uses from the standard library.
fn std_paths(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("std::") {
        if !code[..at].ends_with(|c: char| c.is_alphanumeric() || "_:".contains(c)) {
            leaves(&code[at..], "", &mut found);
        }
    }
    found
}

/// The leaves of a tree of imports. Returns the rest of the code.
fn leaves<'c>(mut code: &'c str, prefix: &str, found: &mut BTreeSet<String>) -> &'c str {
    let path: String = code.chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':')).collect();
    code = &code[path.len()..];
    let prefix = format!("{prefix}{path}");
    let Some(mut list) = code.strip_prefix('{') else {
        found.insert(prefix.trim_end_matches("::self").to_owned());
        return code;
    };
    loop {
        list = list.trim_start_matches([' ', '\n', ',']);
        match list.strip_prefix('}') {
            Some(rest) => return rest,
            None if list.is_empty() => return list,
            None => {
                let rest = leaves(list, &prefix, found);
                // ` as other`
                list = rest.trim_start_matches(|c| c != ',' && c != '}');
            }
        }
    }
}

/// Which module imports which, over all of `src/`: folders, or the modules within them.
fn graph(of: impl Fn(&str) -> String) -> BTreeMap<String, BTreeSet<String>> {
    let files = rust_files("src");
    let modules: BTreeSet<String> = files.iter().map(|file| module_of(file)).collect();
    let mut graph = BTreeMap::new();
    for file in files.iter().filter(|file| !matches!(file.as_str(), "lib.rs" | "main.rs")) {
        let from = module_of(file);
        let edges: &mut BTreeSet<String> = graph.entry(of(&from)).or_default();
        for path in imports(file, &code(file)) {
            let parts: Vec<&str> = path.split("::").collect();
            let (one, two) = (parts[0].to_owned(), parts.iter().take(2).copied().collect::<Vec<_>>().join("::"));
            let to = if modules.contains(&two) { two } else { one };
            if modules.contains(&to) && of(&to) != of(&from) {
                edges.insert(of(&to));
            }
        }
    }
    graph
}

/// The longest chain of imports from each module, or a circle.
fn floors(graph: &BTreeMap<String, BTreeSet<String>>) -> Result<BTreeMap<String, usize>, Vec<String>> {
    fn visit(
        module: &str,
        graph: &BTreeMap<String, BTreeSet<String>>,
        path: &mut Vec<String>,
        floors: &mut BTreeMap<String, usize>,
    ) -> Result<usize, Vec<String>> {
        if let Some(floor) = floors.get(module) {
            return Ok(*floor);
        }
        if let Some(at) = path.iter().position(|other| other == module) {
            return Err(path[at..].to_vec());
        }
        path.push(module.to_owned());
        let mut floor = 1;
        for import in graph.get(module).into_iter().flatten() {
            floor = floor.max(1 + visit(import, graph, path, floors)?);
        }
        path.pop();
        floors.insert(module.to_owned(), floor);
        Ok(floor)
    }
    let mut found = BTreeMap::new();
    for module in graph.keys() {
        visit(module, graph, &mut Vec::new(), &mut found)?;
    }
    Ok(found)
}

#[test]
fn imports_go_down_only() {
    for (module, imports) in graph(|module| top_module(module).to_owned()) {
        for import in imports {
            assert!(layer(&import) < layer(&module), "`{module}` imports `{import}` from a layer above");
        }
    }
}

/// No circle, neither between folders nor between the modules within one.
#[test]
fn nothing_goes_round_in_a_circle_and_the_floors_are_few() {
    let circle = floors(&graph(str::to_owned)).err();
    assert_eq!(circle, None, "these modules import each other in a circle");
    let floors = floors(&graph(|module| top_module(module).to_owned())).unwrap();
    let highest = floors.values().max().unwrap();
    assert!(*highest <= MAX_FLOORS, "{highest} floors: {floors:?}");
}

/// Every public item is used by the service itself: what only tests use belongs to the tests.
#[test]
fn nothing_is_public_for_tests_alone() {
    let words = |text: &str| -> Vec<String> {
        text.lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_'))
            .map(str::to_owned)
            .collect()
    };
    let files = rust_files("src");
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    for word in files.iter().flat_map(|file| words(&code(file))) {
        *count.entry(word).or_default() += 1;
    }
    for file in &files {
        for line in code(file).lines() {
            let Some(item) = line.trim_start().strip_prefix("pub ") else { continue };
            let mut words = words(item).into_iter().filter(|word| !matches!(word.as_str(), "async" | "const" | "unsafe"));
            let (kind, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let kind = if kind.chars().all(char::is_uppercase) { "const" } else { &kind };
            if matches!(kind, "fn" | "struct" | "enum" | "trait" | "type") {
                assert!(count[&name] > 1, "src/{file}: `{name}` is public, and the service itself does not use it");
            }
        }
    }
}

#[test]
fn the_core_is_pure() {
    for file in rust_files("src") {
        let module = top_module(&file);
        if !matches!(module, "domain" | "core") {
            continue;
        }
        let code = code(&file);
        for path in std_paths(&code) {
            let effect = STD_EFFECTS.iter().find(|effect| path.starts_with(&format!("std::{effect}")));
            assert!(effect.is_none(), "src/{file} uses `{path}`");
        }
        // The engine awaits the one effect that a decision has, through a trait of its own.
        for effect in EFFECTS.iter().filter(|_| file != "core/engine.rs") {
            assert!(!code.contains(effect), "src/{file} uses `{effect}`");
        }
    }
}

#[test]
fn nested_imports_of_the_standard_library_are_found() {
    let found = std_paths("use std::{fs, io::{self, stdin}, sync::Arc};\nlet path = std::env::var(name); my_std::fs;");
    assert_eq!(Vec::from_iter(&found), ["std::env::var", "std::fs", "std::io", "std::io::stdin", "std::sync::Arc"]);
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

/// Every deny code is in the README with its meaning, and in the proto.
#[test]
fn every_deny_code_is_explained() {
    let (readme, proto) = (read("README.md"), read("proto/byokgate/v1/policy_decision.proto"));
    for code in DenyCode::VARIANTS {
        assert!(readme.contains(&format!("| `{code}` |")), "README.md has no row for {code}");
        assert!(proto.contains(&format!("  DENY_CODE_{code} = ")), "the proto has no {code}");
    }
}

/// Every proof in `docs/survive.md` exists: a test by its name, or a file.
#[test]
fn every_proof_of_survival_is_there() {
    fn walk(folder: &Path, all: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("node_modules") && !path.ends_with("corpus") {
                walk(&path, all);
            } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "go") {
                all.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut all = String::new();
    ["src", "tests", "clients/go"].into_iter().for_each(|folder| walk(&root().join(folder), &mut all));
    let page = read("docs/survive.md");
    let (mut rows, mut proofs) = (0, 0);
    for row in page.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit()) {
        rows += 1;
        let proven_by = row.split(" | ").nth(2).unwrap();
        for proof in proven_by.split('`').skip(1).step_by(2) {
            let is_there = if proof.contains('/') {
                root().join(proof).exists()
            } else {
                all.contains(&format!("fn {proof}(")) || all.contains(&format!("func {proof}("))
            };
            assert!(is_there, "docs/survive.md: `{proof}` is neither a test nor a file: {row}");
            proofs += 1;
        }
    }
    assert!(rows >= 45 && proofs > rows, "{rows} rows, {proofs} proofs");
}

/// A lint is silenced only with a reason; nothing is left to do.
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
