//! Prometheus text from control's own counters and from what the node says of itself.
//!
//! What comes from the node is checked: a family of a name that Prometheus would not read is left out, so that one
//! bad name never hides all the others.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use penstock_api::rpc::{Labels, MetricFamily, MetricPoints, MetricsInfo};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type Pairs = Vec<(String, String)>;

/// What control counts itself.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    rounds: Family<Pairs, Counter>,
    steps: Family<Pairs, Counter>,
}

impl Counters {
    pub fn round(&self, node_there: bool) {
        let node = if node_there { "there" } else { "away" };
        self.rounds.get_or_create(&vec![("node".to_owned(), node.to_owned())]).inc();
    }

    pub fn step(&self, word: &str, done: bool) {
        let outcome = if done { "done" } else { "refused" };
        let labels = vec![("step".to_owned(), word.to_owned()), ("outcome".to_owned(), outcome.to_owned())];
        self.steps.get_or_create(&labels).inc();
    }
}

/// What is true at the moment of asking.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauges {
    pub node_reachable: bool,
    pub unsettled: usize,
    pub drives: usize,
    pub volumes: usize,
}

/// `node` is absent while the node is away.
pub fn render(counters: &Counters, gauges: Gauges, node: Option<MetricsInfo>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register("penstock_control_rounds", "Looks at the node", counters.rounds.clone());
    registry.register("penstock_control_steps", "Steps carried out at the node", counters.steps.clone());
    let mut gauge = |name: &str, help: &str, value: i64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    gauge("penstock_control_node_reachable", "Whether penstockd answered last time", i64::from(gauges.node_reachable));
    gauge("penstock_control_unsettled", "Things of which desired and observed differ", count(gauges.unsettled));
    gauge("penstock_control_drives", "Drives desired", count(gauges.drives));
    gauge("penstock_control_volumes", "Volumes desired", count(gauges.volumes));
    if let Some(info) = node {
        registry.register_collector(Box::new(NodeMetrics(Arc::new(info))));
    }
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct NodeMetrics(Arc<MetricsInfo>);

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_') && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// The library writes values as they are, so they are escaped here as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn pairs(labels: &Labels) -> Pairs {
    labels.iter().filter(|(key, _)| is_name(key)).map(|(key, value)| (key.clone(), escaped(value))).collect()
}

/// Encodes one point under its labels; without labels it stands bare.
fn point(metric: &mut MetricEncoder, labels: &Labels, encode: impl FnOnce(&mut MetricEncoder) -> fmt::Result) -> fmt::Result {
    let pairs = pairs(labels);
    if pairs.is_empty() { encode(metric) } else { encode(&mut metric.encode_family(&pairs)?) }
}

impl Collector for NodeMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut names = BTreeSet::new();
        for family in &self.0.families {
            // Control's own names start alike and may not come twice.
            let fresh = is_name(&family.name) && !family.name.starts_with("penstock_control_") && names.insert(&family.name);
            if fresh {
                encode_family(&mut encoder, family)?;
            }
        }
        Ok(())
    }
}

fn encode_family(encoder: &mut DescriptorEncoder, family: &MetricFamily) -> fmt::Result {
    let kind = match family.points {
        MetricPoints::Counter(_) => MetricType::Counter,
        MetricPoints::Gauge(_) => MetricType::Gauge,
        MetricPoints::Histogram(_) => MetricType::Histogram,
    };
    let help: String = family.help.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut metric: MetricEncoder = encoder.encode_descriptor(&family.name, &help, None, kind)?;
    match &family.points {
        MetricPoints::Counter(points) => points
            .iter()
            .try_for_each(|p| point(&mut metric, &p.labels, |metric| metric.encode_counter::<NoLabelSet, _, f64>(&p.value, None))),
        MetricPoints::Gauge(points) => {
            points.iter().try_for_each(|p| point(&mut metric, &p.labels, |metric| metric.encode_gauge(&p.value)))
        }
        MetricPoints::Histogram(points) => points.iter().filter(|p| p.counts.len() == p.bounds.len() + 1).try_for_each(|p| {
            let bounds = p.bounds.iter().copied().chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(p.counts.iter().copied()).collect();
            let count = p.counts.iter().fold(0u64, |sum, n| sum.saturating_add(*n));
            point(&mut metric, &p.labels, |metric| metric.encode_histogram::<NoLabelSet>(p.sum, count, &buckets, None))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::rpc::{CounterPoint, HistogramPoint};

    #[test]
    fn metrics_of_node_and_control_render_as_prometheus_text() {
        let labels: Labels = [("drive".to_owned(), "d\"0\n".to_owned()), ("bad-key".to_owned(), "x".to_owned())].into();
        let family = |name: &str, points| MetricFamily { name: name.to_owned(), help: "Two\nlines".to_owned(), points };
        let histogram = HistogramPoint { labels: Labels::new(), bounds: vec![1.0, 10.0], counts: vec![1, 2, 3], sum: 99.5 };
        let info = MetricsInfo {
            incarnation: 1,
            families: vec![
                family("penstock_drive_writes", MetricPoints::Counter(vec![CounterPoint { labels, value: 7 }])),
                family("penstock_flush_us", MetricPoints::Histogram(vec![histogram])),
                family("bad name", MetricPoints::Gauge(vec![])),
                family("penstock_control_rounds", MetricPoints::Gauge(vec![])),
            ],
        };
        let counters = Counters::default();
        counters.round(true);
        let text = render(&counters, Gauges { node_reachable: true, ..Gauges::default() }, Some(info)).unwrap();
        for line in [
            "penstock_control_rounds_total{node=\"there\"} 1",
            "penstock_control_node_reachable 1",
            "penstock_drive_writes_total{drive=\"d\\\"0\\n\"} 7",
            "penstock_flush_us_bucket{le=\"10.0\"} 3",
            "penstock_flush_us_bucket{le=\"+Inf\"} 6",
            "penstock_flush_us_sum 99.5",
            "# HELP penstock_flush_us Two lines",
        ] {
            assert!(text.lines().any(|found| found.trim_end_matches('.') == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("bad"), "{text}");
    }
}
