//! Counters and histograms that modules own, and the metrics page that shows them. This module does not know what they count.
//!
//! On a decision's path a metric is a plain atomic that its module owns. There is no global recorder, no lookup by name and no allocation.
//! prometheus-client, which writes the page, would look up each count by its labels behind a lock. Values that exist anyway (entries, queues,
//! states) are read when the page is requested, by [`Collect::collect`].

pub mod calls;
pub mod decisions;
pub mod loaded;
pub mod process;
pub mod reloads;

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};

/// The content type of the page.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The upper bounds of a histogram's buckets. A cached key is decided in microseconds, a vendor answers in tenths of a second, and nothing takes
/// more than ten seconds.
pub const BOUNDS: [Duration; 14] = [
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_millis(1),
    Duration::from_micros(2_500),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_millis(2_500),
    Duration::from_secs(5),
    Duration::from_secs(10),
];

/// A source of metrics.
pub trait Collect: Send + Sync {
    /// Adds its metrics to the page. A metric that was never measured is absent, and not 0.
    fn collect(&self, page: &mut Page);
}

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// A histogram of durations.
#[derive(Debug, Default)]
pub struct Histogram {
    /// One bucket for each bound, and one for durations over the last bound.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

/// The metrics page as it is now.
#[derive(Debug)]
pub struct Page {
    /// The known providers. A series about any other one is dropped, so that a caller's text can never become a label.
    providers: BTreeSet<String>,
    families: Vec<Family>,
}

/// All series of one name.
#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    series: Vec<Series>,
}

#[derive(Debug)]
struct Series {
    labels: Vec<(&'static str, String)>,
    value: Value,
}

/// The labels of one series.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'p>(&'p [(&'static str, String)]);

impl<'p> Labels<'p> {
    /// The value of this label.
    pub fn get(&self, name: &str) -> Option<&'p str> {
        self.0.iter().find(|(label, _)| *label == name).map(|(_, value)| value.as_str())
    }
}

/// The value of a series.
#[derive(Debug, Clone)]
pub enum Value {
    /// A whole number.
    Whole(u64),
    /// A real number.
    Real(f64),
    /// The count of each bucket, not cumulative, and the sum of all durations.
    Buckets([u64; BOUNDS.len() + 1], Duration),
}

/// Adds series to one family.
#[derive(Debug)]
pub struct FamilyWriter<'p> {
    providers: &'p BTreeSet<String>,
    series: &'p mut Vec<Series>,
}

/// The label with a provider's name.
pub const PROVIDER: &str = "provider";

// === impl Counter ===

impl Counter {
    /// A counter at 0.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds one.
    pub fn inc(&self) {
        self.inc_by(1);
    }

    /// Adds this many.
    pub fn inc_by(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The present count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

// === impl Histogram ===

impl Histogram {
    /// Adds a duration.
    pub fn observe(&self, took: Duration) {
        let bucket = BOUNDS.iter().position(|bound| took <= *bound).unwrap_or(BOUNDS.len());
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Its value. `None` if it is empty.
    pub fn value(&self) -> Option<Value> {
        let buckets = self.buckets.each_ref().map(|bucket| bucket.load(Ordering::Relaxed));
        let nanos = Duration::from_nanos(self.nanos.load(Ordering::Relaxed));
        buckets.iter().any(|count| *count > 0).then_some(Value::Buckets(buckets, nanos))
    }
}

// === impl Page ===

impl Page {
    /// An empty page about these providers.
    pub fn about<'n>(providers: impl Iterator<Item = &'n str>) -> Self {
        Self { providers: providers.map(str::to_owned).collect(), families: Vec::new() }
    }

    /// A counter family. `_total` is appended to its name.
    pub fn counter(&mut self, name: &'static str, help: &'static str) -> FamilyWriter<'_> {
        self.family(name, help, MetricType::Counter)
    }

    /// A gauge family.
    pub fn gauge(&mut self, name: &'static str, help: &'static str) -> FamilyWriter<'_> {
        self.family(name, help, MetricType::Gauge)
    }

    /// A histogram family.
    pub fn histogram(&mut self, name: &'static str, help: &'static str) -> FamilyWriter<'_> {
        self.family(name, help, MetricType::Histogram)
    }

    /// The family of this name, made if it is new: several sources may add to one family.
    fn family(&mut self, name: &'static str, help: &'static str, kind: MetricType) -> FamilyWriter<'_> {
        let Self { providers, families } = self;
        let index = families.iter().position(|family| family.name == name).unwrap_or_else(|| {
            families.push(Family { name, help, kind, series: Vec::new() });
            families.len() - 1
        });
        #[expect(clippy::indexing_slicing, reason = "found or made in the line above")]
        let series = &mut families[index].series;
        FamilyWriter { providers, series }
    }

    /// The series of this family and their values, without histograms.
    pub fn values<'p>(&'p self, name: &str) -> impl Iterator<Item = (Labels<'p>, f64)> + use<'p> {
        let family = self.families.iter().find(|family| family.name == name);
        family.into_iter().flat_map(|family| &family.series).filter_map(|Series { labels, value }| match value {
            Value::Whole(number) => Some((Labels(labels), *number as f64)),
            Value::Real(number) => Some((Labels(labels), *number)),
            Value::Buckets(..) => None,
        })
    }

    /// The page as text, in OpenMetrics.
    pub fn text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for Family { name, help, kind, series } in self.families.iter().filter(|family| !family.series.is_empty()) {
            let mut family = encoder.encode_descriptor(name, help, None, *kind)?;
            for Series { labels, value } in series {
                let labels: Vec<(&str, &str)> = labels.iter().map(|(name, value)| (*name, value.as_str())).collect();
                if labels.is_empty() {
                    encode(&mut family, *kind, value)?;
                } else {
                    encode(&mut family.encode_family(&labels)?, *kind, value)?;
                }
            }
        }
        Ok(())
    }
}

fn encode(encoder: &mut MetricEncoder<'_>, kind: MetricType, value: &Value) -> Result<(), fmt::Error> {
    match (value, kind) {
        (Value::Whole(number), MetricType::Counter) => encoder.encode_counter::<NoLabelSet, _, f64>(number, None),
        (Value::Real(number), MetricType::Counter) => encoder.encode_counter::<NoLabelSet, _, f64>(number, None),
        (Value::Whole(number), _) => encoder.encode_gauge(&i64::try_from(*number).unwrap_or(i64::MAX)),
        (Value::Real(number), _) => encoder.encode_gauge(number),
        (Value::Buckets(counts, sum), _) => {
            let bounds = BOUNDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = bounds.zip(*counts).collect();
            encoder.encode_histogram::<NoLabelSet>(sum.as_secs_f64(), counts.iter().sum(), &buckets, None)
        }
    }
}

// === impl FamilyWriter ===

impl FamilyWriter<'_> {
    /// Adds a series, unless it is about a provider that is not loaded.
    pub fn add(&mut self, labels: &[(&'static str, &str)], value: impl Into<Value>) {
        let known = |(name, value): &(&str, &str)| *name != PROVIDER || value.is_empty() || self.providers.contains(*value);
        if labels.iter().all(known) {
            let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
            self.series.push(Series { labels, value: value.into() });
        }
    }

    /// Adds a count if it is not 0. With all zeros, the combinations of labels would be thousands.
    pub fn add_if_any(&mut self, labels: &[(&'static str, &str)], count: &Counter) {
        let count = count.get();
        if count > 0 {
            self.add(labels, count);
        }
    }
}

impl From<&Counter> for Value {
    fn from(counter: &Counter) -> Self {
        Self::Whole(counter.get())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Whole(number)
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::Whole(number as u64)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

impl<M: Collect> Collect for Arc<M> {
    fn collect(&self, page: &mut Page) {
        self.as_ref().collect(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_open_metrics() {
        let mut page = Page::about(["acme"].into_iter());
        page.counter("x", "Counts").add(&[(PROVIDER, "acme"), ("code", "A \"B\"\n")], 3_u64);
        page.counter("x", "Counts").add(&[(PROVIDER, "")], 4_u64);
        page.gauge("never", "Absent");
        page.gauge("y_seconds", "Goes").add(&[], 0.5);
        let took = Histogram::default();
        assert!(took.value().is_none());
        for micros in [100, 101, 20_000_000] {
            took.observe(Duration::from_micros(micros));
        }
        page.histogram("z_seconds", "Took").add(&[], took.value().unwrap());
        let text = page.text().unwrap();
        let buckets: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("z_seconds_bucket{le=")?.split(' ').next_back()).collect();
        assert_eq!(buckets, [vec!["1"], vec!["2"; 13], vec!["3"]].concat());
        let rest: Vec<&str> = text.lines().filter(|line| !line.contains("_bucket")).collect();
        assert_eq!(
            rest,
            [
                "# HELP x Counts",
                "# TYPE x counter",
                "x_total{provider=\"acme\",code=\"A \\\"B\\\"\\n\"} 3",
                "x_total{provider=\"\"} 4",
                "# HELP y_seconds Goes",
                "# TYPE y_seconds gauge",
                "y_seconds 0.5",
                "# HELP z_seconds Took",
                "# TYPE z_seconds histogram",
                "z_seconds_sum 20.000201",
                "z_seconds_count 3",
                "# EOF",
            ]
        );
    }

    #[test]
    fn a_provider_that_is_not_loaded_is_no_label() {
        let mut page = Page::about(["acme"].into_iter());
        page.counter("x", "Counts").add(&[(PROVIDER, "stranger")], 3_u64);
        assert_eq!(page.text().unwrap(), "# EOF\n");
    }
}
