//! Structured metrics of a node. Control turns them into Prometheus text.
//!
//! A family's name carries its unit last (`penstock_drive_flush_duration_us`). Counters only grow within one
//! incarnation of the node.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricsInfo {
    /// Of the node, as in NodeInfo: a change means that counters began anew.
    pub incarnation: u64,
    pub families: Vec<MetricFamily>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricFamily {
    /// `[a-z][a-z0-9_]*`, without Prometheus' suffix `_total`.
    pub name: String,
    pub help: String,
    pub points: MetricPoints,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "points", rename_all = "snake_case")]
pub enum MetricPoints {
    Counter(Vec<CounterPoint>),
    Gauge(Vec<GaugePoint>),
    Histogram(Vec<HistogramPoint>),
}

pub type Labels = BTreeMap<String, String>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterPoint {
    #[serde(default)]
    pub labels: Labels,
    pub value: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GaugePoint {
    #[serde(default)]
    pub labels: Labels,
    pub value: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistogramPoint {
    #[serde(default)]
    pub labels: Labels,
    /// Upper bounds, inclusive, rising, in the unit of the name.
    pub bounds: Vec<f64>,
    /// One count per bound, then one for all above: `bounds.len() + 1`, not cumulative.
    pub counts: Vec<u64>,
    pub sum: f64,
}
