//! The metrics page, as a scraper reads it: over a real socket, or from this process.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use byok_gate::{
    config::settings::Settings,
    core::engine::{Engine, Prober},
    liveness::{cache::Cache, prober::HttpProber, provider_limits::ProviderLimiter},
    server::{Address, Bound},
    telemetry::metrics::{Collect, Page, loaded},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};

use super::{binary::PATIENCE, edge::Edge, gate::Files};

/// What was scraped.
#[derive(Debug, Clone)]
pub(crate) struct Scraped {
    pub(crate) text: String,
    /// Each series with its labels, as it is written.
    series: BTreeMap<String, f64>,
}

/// What came back over HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Scraped {
    pub(crate) fn of(text: &str) -> Self {
        assert!(text.ends_with("# EOF\n"), "{text}");
        let mut series = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(series.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{name} appears twice");
        }
        Self { text: text.to_owned(), series }
    }

    /// Of what has numbers in this process.
    pub(crate) fn in_process(engine: &Engine, sources: &[&dyn Collect]) -> Self {
        let snapshot = engine.snapshot();
        let mut page = Page::about(snapshot.registry.providers().iter().map(|provider| provider.name.as_str()));
        loaded::collect(&snapshot, std::time::SystemTime::now(), &mut page);
        sources.iter().for_each(|source| source.collect(&mut page));
        Self::of(&page.text().unwrap())
    }

    #[track_caller]
    pub(crate) fn is(&self, series: &str, value: f64) {
        assert_eq!(self.series.get(series), Some(&value), "{series} in\n{}", self.text);
    }

    pub(crate) fn get(&self, series: &str) -> Option<f64> {
        self.series.get(series).copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.series.len()
    }

    /// Names with their types.
    pub(crate) fn families(&self) -> BTreeSet<(String, String)> {
        let types = self.text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
    }

    pub(crate) fn has(&self, family: &str) -> bool {
        self.families().iter().any(|(name, _)| name == family)
    }
}

/// Sends this on a new connection and reads to the end.
pub(crate) async fn say(address: SocketAddr, words: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(words.as_bytes()).await.unwrap();
    let mut said = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut said)).await.unwrap().unwrap();
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {said:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

pub(crate) async fn scrape(address: SocketAddr) -> Scraped {
    let answer = say(address, "GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    Scraped::of(&answer.body)
}

/// The page as soon as it fits.
pub(crate) async fn scrape_until(address: SocketAddr, fits: impl Fn(&Scraped) -> bool) -> Scraped {
    let ends = Instant::now() + PATIENCE;
    loop {
        let page = scrape(address).await;
        if fits(&page) {
            return page;
        }
        assert!(Instant::now() < ends, "it never came to that: {}", page.text);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A server whose numbers are all shown.
pub(crate) struct Shown {
    pub(crate) edge: Edge,
    pub(crate) admin: SocketAddr,
}

impl Shown {
    /// With a real prober.
    pub(crate) async fn start(mut settings: Settings, files: &Files) -> Self {
        settings.probe.allow_loopback_http = true;
        let prober = Arc::new(HttpProber::new(settings.probe_settings(Vec::new(), None)).unwrap());
        Self::over(settings, files, prober.clone(), vec![prober]).await
    }

    /// With this asker, and further sources of numbers.
    pub(crate) async fn over(
        mut settings: Settings,
        files: &Files,
        prober: Arc<dyn Prober>,
        sources: Vec<Arc<dyn Collect>>,
    ) -> Self {
        settings.admin.listen = Some("127.0.0.1:0".to_owned());
        let limited = Arc::new(ProviderLimiter::new(prober, settings.provider_limits));
        let cache = Arc::new(Cache::new(limited.clone(), settings.cache_settings()));
        let engine = files.engine_over(cache.clone());
        let mut bound = Bound::open(settings.edge()).await.unwrap();
        bound.register(limited);
        bound.register(cache);
        sources.into_iter().for_each(|source| bound.register(source));
        let Some(Address::Tcp(admin)) = bound.admin_address() else { panic!("it shows nothing") };
        Self { edge: Edge::run(bound, engine), admin }
    }

    pub(crate) async fn scrape(&self) -> Scraped {
        scrape(self.admin).await
    }

    /// The page as soon as it matches, for events shortly after the answer.
    pub(crate) async fn scrape_until(&self, fits: impl Fn(&Scraped) -> bool) -> Scraped {
        scrape_until(self.admin, fits).await
    }
}
