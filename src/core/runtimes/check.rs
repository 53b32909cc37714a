//! Checks the `runtimes:` section of a catalogue and builds `Runtimes`. Reports all problems at once.

use std::{collections::BTreeMap, str::FromStr};

use url::Url;

use super::{
    Certainty, Delivery, General, Route, RuntimeFacts, Runtimes, Trims,
    file::{DeliveryFile, OneOrMany, RouteFile, RuntimeFile},
};
use crate::domain::{
    problem::Problem,
    protocol::{HeaderFamily, Surface},
};

/// Checks the whole section.
pub(crate) fn check(section: BTreeMap<String, RuntimeFile>, problems: &mut Vec<Problem>) -> Runtimes {
    let facts = section.into_iter().map(|(name, file)| {
        let facts = Checker { place: format!("runtimes.{name}"), problems }.runtime(file);
        (name, facts)
    });
    Runtimes::of(facts.collect())
}

struct Checker<'p> {
    place: String,
    problems: &'p mut Vec<Problem>,
}

// === impl Checker ===

impl Checker<'_> {
    fn runtime(&mut self, file: RuntimeFile) -> RuntimeFacts {
        let RuntimeFile {
            version,
            sources,
            certainty,
            trims,
            organization_loses,
            falls_back,
            sends,
            surface,
            base_url_env,
            providers,
        } = file;
        if version.trim().is_empty() {
            self.problem("version", "is missing: facts belong to a version; say which");
        }
        if sources.is_empty() {
            self.problem("sources", "is missing: say where it was seen or read, and when");
        }
        let certainty = self.certainty(certainty.as_deref()).unwrap_or_default();
        let trims = match trims.as_deref() {
            None | Some("nothing") => Trims::Nothing,
            Some("end") => Trims::End,
            Some("both_ends") => Trims::BothEnds,
            Some(other) => {
                self.problem("trims", format!("must be `nothing`, `end` or `both_ends`, found `{other}`"));
                Trims::Nothing
            }
        };
        let surface = self.surface(surface);
        let general = match (sends, surface) {
            (Some(sends), Some(surface)) => Some(General { headers: self.headers("sends", sends), surface }),
            (Some(_), None) => {
                self.problem("surface", "is required with `sends`");
                None
            }
            (None, _) => None,
        };
        let routes = providers.unwrap_or_default().into_iter().map(|(name, file)| {
            let mut checker = Checker { place: format!("{}.providers.{name}", self.place), problems: self.problems };
            (name, checker.route(file, certainty, surface))
        });
        RuntimeFacts {
            routes: routes.collect(),
            version,
            sources,
            certainty,
            trims,
            organization_loses: organization_loses.unwrap_or_default().into_iter().collect(),
            falls_back,
            general,
            base_url_env,
        }
    }

    fn route(&mut self, file: RouteFile, of_runtime: Certainty, surface: Option<Surface>) -> Route {
        let RouteFile {
            certainty,
            reads,
            beaten_by,
            header,
            surface: own_surface,
            base,
            by_prefix,
            by_env,
            also_sends,
            base_url_env,
        } = file;
        let Some(reads) = reads else {
            self.problem("reads", "is missing: name the variables in the order in which they are read; [] if it reads none");
            return Route::default();
        };
        let mut delivery = self.delivery(DeliveryFile { header, surface: own_surface, base });
        delivery.surface = delivery.surface.or(surface);
        let mut prefixes: Vec<(String, Delivery)> = Vec::new();
        for (prefix, file) in by_prefix.unwrap_or_default() {
            let own = self.delivery(file);
            let pick = |own: Vec<HeaderFamily>| if own.is_empty() { delivery.headers.clone() } else { own };
            let whole = Delivery {
                headers: pick(own.headers),
                surface: own.surface.or(delivery.surface),
                base: own.base.or_else(|| delivery.base.clone()),
            };
            prefixes.push((prefix, whole));
        }
        // The longest prefix comes first, so that it wins.
        prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
        let by_env = by_env.unwrap_or_default().into_iter().filter_map(|(name, base)| Some((name, self.base(&base)?)));
        let by_env = by_env.collect();
        let certainty = self.certainty(certainty.as_deref()).unwrap_or(of_runtime);
        let also_sends = self.headers("also_sends", also_sends.unwrap_or_default());
        Route {
            certainty,
            reads,
            beaten_by: beaten_by.unwrap_or_default(),
            delivery,
            by_prefix: prefixes,
            by_env,
            also_sends,
            base_url_env,
        }
    }

    fn delivery(&mut self, DeliveryFile { header, surface, base }: DeliveryFile) -> Delivery {
        let words = match header {
            None => Vec::new(),
            Some(OneOrMany::One(word)) => vec![word],
            Some(OneOrMany::Many(words)) => words,
        };
        let headers = words.iter().filter_map(|word| self.word::<HeaderFamily>("header", word)).collect();
        Delivery { headers, surface: self.surface(surface), base: base.and_then(|base| self.base(&base)) }
    }

    fn headers(&mut self, key: &str, words: BTreeMap<String, String>) -> BTreeMap<String, HeaderFamily> {
        words.into_iter().filter_map(|(name, word)| Some((name, self.word(key, &word)?))).collect()
    }

    fn surface(&mut self, word: Option<String>) -> Option<Surface> {
        self.word("surface", &word?)
    }

    fn base(&mut self, text: &str) -> Option<Url> {
        // The prober decides whether plain http may be used, as for the base URLs of the registry.
        let is_base = |url: &Url| matches!(url.scheme(), "https" | "http") && url.query().is_none() && url.fragment().is_none();
        let url = Url::parse(text).ok().filter(is_base);
        if url.is_none() {
            self.problem("base", format!("`{text}` must be an https or http URL without a query"));
        }
        url
    }

    fn certainty(&mut self, word: Option<&str>) -> Option<Certainty> {
        match word? {
            "seen" => Some(Certainty::Seen),
            "read" => Some(Certainty::Read),
            "reported" => Some(Certainty::Reported),
            other => {
                self.problem("certainty", format!("must be `seen`, `read` or `reported`, found `{other}`"));
                None
            }
        }
    }

    fn word<T: FromStr>(&mut self, key: &str, word: &str) -> Option<T> {
        let known = word.parse().ok();
        if known.is_none() {
            self.problem(key, format!("`{word}` is none that this service knows"));
        }
        known
    }

    fn problem(&mut self, key: &str, message: impl Into<String>) {
        self.problems.push(Problem::at(format!("{}.{key}", self.place), message));
    }
}
