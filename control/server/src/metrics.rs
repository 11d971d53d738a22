//! Prometheus text from control's own counters and from what the nodes say of themselves; where there are several, each of their points
//! says which by a label `node`.
//!
//! What comes from a node is checked: a family of a name that Prometheus would not read is left out, so that one
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
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// By name, whether it answered last time.
    pub nodes: Vec<(String, bool)>,
    pub unsettled: usize,
    pub drives: usize,
    pub volumes: usize,
}

/// `nodes`: what those that are there say.
pub fn render(counters: &Counters, gauges: &Gauges, nodes: Vec<(String, MetricsInfo)>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register("penstock_control_rounds", "Looks at the node", counters.rounds.clone());
    registry.register("penstock_control_steps", "Steps carried out at the node", counters.steps.clone());
    let mut gauge = |name: &str, help: &str, value: i64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    gauge("penstock_control_unsettled", "Things of which desired and observed differ", count(gauges.unsettled));
    gauge("penstock_control_drives", "Drives desired", count(gauges.drives));
    gauge("penstock_control_volumes", "Volumes desired", count(gauges.volumes));
    let are_several = gauges.nodes.len() > 1;
    let help = "Whether penstockd answered last time";
    match gauges.nodes.as_slice() {
        // Bare, as it was before there were several.
        [(_, is_there)] => gauge("penstock_control_node_reachable", help, i64::from(*is_there)),
        several => {
            let reachable: Family<Pairs, Gauge> = Family::default();
            for (name, is_there) in several {
                reachable.get_or_create(&vec![("node".to_owned(), name.clone())]).set(i64::from(*is_there));
            }
            registry.register("penstock_control_node_reachable", help, reachable);
        }
    }
    registry.register_collector(Box::new(NodeMetrics(Arc::new(merged(nodes, are_several)))));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

/// The families of all nodes, each once; the first that names a family says what kind it is.
fn merged(nodes: Vec<(String, MetricsInfo)>, are_several: bool) -> Vec<MetricFamily> {
    let mut families: Vec<MetricFamily> = Vec::new();
    for (name, info) in nodes {
        for mut family in info.families {
            if are_several {
                label(&mut family.points, &name);
            }
            let known = families.iter_mut().find(|known| known.name == family.name);
            match (known.map(|known| &mut known.points), family.points) {
                (Some(MetricPoints::Counter(all)), MetricPoints::Counter(points)) => all.extend(points),
                (Some(MetricPoints::Gauge(all)), MetricPoints::Gauge(points)) => all.extend(points),
                (Some(MetricPoints::Histogram(all)), MetricPoints::Histogram(points)) => all.extend(points),
                (Some(_), _) => {} // of another kind: two versions of penstockd
                (None, points) => families.push(MetricFamily { points, ..family }),
            }
        }
    }
    families
}

fn label(points: &mut MetricPoints, node: &str) {
    let add = |labels: &mut Labels| drop(labels.insert("node".to_owned(), node.to_owned()));
    match points {
        MetricPoints::Counter(points) => points.iter_mut().for_each(|point| add(&mut point.labels)),
        MetricPoints::Gauge(points) => points.iter_mut().for_each(|point| add(&mut point.labels)),
        MetricPoints::Histogram(points) => points.iter_mut().for_each(|point| add(&mut point.labels)),
    }
}

#[derive(Debug)]
struct NodeMetrics(Arc<Vec<MetricFamily>>);

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
        for family in self.0.iter() {
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
        let one = Gauges { nodes: vec![("local".to_owned(), true)], ..Gauges::default() };
        let text = render(&counters, &one, vec![("local".to_owned(), info.clone())]).unwrap();
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

        let three = Gauges { nodes: vec![("a".to_owned(), true), ("b".to_owned(), false), ("c".to_owned(), true)], ..Gauges::default() };
        let text = render(&counters, &three, vec![("a".to_owned(), info.clone()), ("c".to_owned(), info)]).unwrap();
        for line in [
            "penstock_control_node_reachable{node=\"b\"} 0",
            "penstock_drive_writes_total{drive=\"d\\\"0\\n\",node=\"a\"} 7",
            "penstock_drive_writes_total{drive=\"d\\\"0\\n\",node=\"c\"} 7",
            "penstock_flush_us_sum{node=\"c\"} 99.5",
        ] {
            assert!(text.lines().any(|found| found.trim_end_matches('.') == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("# TYPE penstock_drive_writes ").count(), 1, "{text}");
    }
}
