//! What the node says of itself: NodeInfo, and metrics from all cores.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use penstock_api::rpc::{
    CoreInfo, CounterPoint, DrainInfo, DrainParams, ErrorCode, GaugePoint, HistogramPoint, MetricFamily, MetricPoints, MetricsInfo,
    NodeInfo, PollMode, SpdkInfo,
};
use penstock_api::{ByteSize, DriveId};
use penstock_engine::Order;

use super::{Answer, Node, fail};
use crate::config::Poll;
use crate::core::{CoreView, LATENCY_BOUNDS_US};

const BLOCK: u64 = penstock_wire::BLOCK as u64;
const EXTENT: u64 = penstock_wire::EXTENT as u64;
const SPDK_VERSION: &str = "26.01.0";

impl Node {
    /// Numbers of the reactor cores, by index.
    pub(super) fn core_numbers(&self) -> Vec<u32> {
        self.cores.borrow().iter().map(|c| c.core).collect()
    }

    /// Looks at all cores, then calls `then` with what they show, in order.
    pub(super) fn gather(self: &Rc<Self>, then: impl FnOnce(&Rc<Node>, Vec<CoreView>) + 'static) {
        let cores = self.cores.borrow().clone();
        if cores.is_empty() {
            return then(self, Vec::new());
        }
        let views: Rc<RefCell<Vec<CoreView>>> = Rc::default();
        let then = Rc::new(RefCell::new(Some(then)));
        let count = cores.len();
        for core in cores {
            let (views, then) = (views.clone(), then.clone());
            self.ask_core(
                core.index,
                |core, replier| replier.reply(core.view()),
                move |node, view: CoreView| {
                    views.borrow_mut().push(view);
                    if views.borrow().len() == count {
                        let mut all = views.take();
                        all.sort_by_key(|v| v.index);
                        let then = then.borrow_mut().take();
                        if let Some(then) = then {
                            then(node, all);
                        }
                    }
                },
            );
        }
    }

    pub(super) fn node_get(self: &Rc<Self>, answer: Answer<NodeInfo>) {
        self.gather(move |node, views| {
            let volumes = node.volumes.borrow();
            let state = node.state.borrow();
            let cores = views.iter().map(|v| CoreInfo {
                core: v.core,
                busy_fraction: v.busy_fraction,
                stores: v.shards.len() as u32,
                volumes: volumes.values().filter(|one| one.core == v.index).count() as u32,
            });
            answer(Ok(NodeInfo {
                cluster_id: state.get().cluster_id,
                node_id: state.get().node_id,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                api: penstock_api::API_VERSION,
                pid: std::process::id(),
                uptime_s: node.started.elapsed().as_secs(),
                incarnation: node.incarnation,
                cores: cores.collect(),
                poll: match node.config.poll {
                    Poll::Busy => PollMode::Busy,
                    Poll::Adaptive => PollMode::Adaptive,
                },
                no_huge: node.config.no_huge,
                spdk: SpdkInfo { version: SPDK_VERSION.to_owned(), tree: spdk_rs::SPDK_TREE.to_owned() },
                drives: node.drives.borrow().len() as u32,
                volumes: volumes.len() as u32,
                peer_address: node.config.peer_listen,
                peers: node.peer_infos(&views),
            }));
        });
    }

    /// Drains one drive or all; answers when the last is done. The node's stop bound is the bound.
    pub(super) fn drain(self: &Rc<Self>, params: DrainParams, answer: Answer<DrainInfo>) {
        let wanted: Vec<(DriveId, _, _)> = {
            let drives = self.drives.borrow();
            drives
                .iter()
                .filter(|(id, _)| params.drive_id.is_none_or(|one| one == **id))
                .map(|(&id, d)| (id, d.key, d.stores.clone()))
                .collect()
        };
        if let (Some(id), true) = (params.drive_id, wanted.is_empty()) {
            return answer(Err(fail(ErrorCode::NotFound, format!("there is no drive {id}"), "`penstock pool ls` shows those there are")));
        }
        let started = std::time::Instant::now();
        let places: Vec<_> = wanted
            .into_iter()
            .flat_map(|(id, key, stores)| stores.into_iter().enumerate().map(move |(no, place)| (id, key, no as u32, place.core)))
            .collect();
        self.gather(move |node, before| {
            let drained = |views: &[CoreView]| views.iter().flat_map(|v| &v.shards).map(|s| s.view.counters.drained_blocks).sum::<u64>();
            let before = drained(&before);
            let finish = move |node: &Rc<Node>, answer: Answer<DrainInfo>| {
                node.gather(move |_, after| {
                    let bytes = drained(&after).saturating_sub(before) * penstock_wire::BLOCK as u64;
                    answer(Ok(DrainInfo { drained_bytes: ByteSize(bytes), ms: started.elapsed().as_millis() as u64 }));
                });
            };
            if places.is_empty() {
                return finish(node, answer);
            }
            let left = Rc::new(std::cell::Cell::new(places.len()));
            let waiting = Rc::new(RefCell::new(Some(answer)));
            // The bound: whoever comes first takes the answer.
            let late = waiting.clone();
            node.after(std::time::Duration::from_secs(u64::from(node.config.stop_timeout_s)), move |_| {
                let answer = late.borrow_mut().take();
                if let Some(answer) = answer {
                    answer(Err(fail(ErrorCode::NotReady, "draining goes on, but takes longer than a call may", "ask again")));
                }
            });
            for (id, key, no, core) in places {
                let (left, waiting) = (left.clone(), waiting.clone());
                node.order(core, key, no, Order::Drain, move |node, result| {
                    if let Err(error) = result {
                        let answer = waiting.borrow_mut().take();
                        if let Some(answer) = answer {
                            let message = format!("drive {id} does not drain: {error:?}");
                            answer(Err(fail(ErrorCode::NotReady, message, "see the drive's state with `penstock pool ls`")));
                        }
                    }
                    left.set(left.get() - 1);
                    let answer = if left.get() == 0 { waiting.borrow_mut().take() } else { None };
                    if let Some(answer) = answer {
                        finish(node, answer);
                    }
                });
            }
        });
    }

    pub(super) fn metrics_get(self: &Rc<Self>, answer: Answer<MetricsInfo>) {
        self.gather(move |node, views| answer(Ok(node.metrics(&views))));
    }

    fn metrics(&self, views: &[CoreView]) -> MetricsInfo {
        let mut table = Table::default();
        let drives = self.drives.borrow();
        let drive_of = |key| drives.iter().find(|(_, d)| d.key == key).map(|(id, _)| id.to_string()).unwrap_or_default();
        table.gauge("penstock_node_uptime_s", "Seconds since penstockd started", &[], self.started.elapsed().as_secs_f64());
        for view in views {
            let core = view.core.to_string();
            let of_core = &[("core", core.as_str())];
            table.gauge(
                "penstock_core_busy_ratio",
                "Share of its time that the core's loop worked, since the last look",
                of_core,
                view.busy_fraction,
            );
            table.gauge("penstock_core_buffer_bytes", "Memory taken for the engine's buffers", of_core, view.memory_bytes as f64);
            let c = &view.counters;
            for (name, help, value) in [
                ("penstock_core_turns", "Turns of the loop", c.turns),
                ("penstock_core_busy_turns", "Turns that did something", c.busy_turns),
                ("penstock_core_host_commands", "Commands from hosts", c.host_commands),
                ("penstock_core_disk_completions", "Completed device commands", c.disk_completions),
                ("penstock_core_ticks", "Ticks of the clock", c.ticks),
                ("penstock_core_orders", "Orders from control", c.orders),
                ("penstock_core_buffers", "Buffers given to the engine", view.memory.buffers),
                ("penstock_core_buffer_shortages", "Times there was no buffer", view.memory.shortages),
                ("penstock_core_buffer_chunks", "Allocations of memory for buffers", view.memory.chunks),
                ("penstock_core_copied_bytes", "Payload bytes that were copied", view.memory.copied_bytes),
            ] {
                table.counter(name, help, of_core, value);
            }
            for peer in &view.peers {
                let node = penstock_api::NodeId::from_bytes(peer.node.0).map_or_else(|_| peer.node.to_string(), |id| id.to_string());
                let labels = &[("peer", node.as_str()), ("core", core.as_str())];
                table.gauge("penstock_peer_up", "1 while the peer is heard on this core", labels, f64::from(u8::from(peer.up.is_some())));
                table.gauge("penstock_peer_queued_bytes", "Bytes that wait to be sent to the peer", labels, peer.queued_bytes as f64);
                let c = &peer.counters;
                for (name, help, value) in [
                    ("penstock_peer_frames_sent", "Frames sent to the peer", c.frames_sent),
                    ("penstock_peer_frames_received", "Frames received from the peer", c.frames_received),
                    ("penstock_peer_bytes_sent", "Bytes sent to the peer", c.bytes_sent),
                    ("penstock_peer_bytes_received", "Bytes received from the peer", c.bytes_received),
                    ("penstock_peer_words_dropped", "Words not sent: queue full, or not connected", c.words_dropped),
                    (
                        "penstock_peer_words_unplaced",
                        "Words that came for a segment that is not here, or while memory was short",
                        c.words_unplaced,
                    ),
                    ("penstock_peer_connects", "Connections that came to stand", c.connects),
                    ("penstock_peer_disconnects", "Connections that ended", c.disconnects),
                ] {
                    table.counter(name, help, labels, value);
                }
            }
            for shard in &view.shards {
                let (drive, store) = (drive_of(shard.drive), shard.store_no.to_string());
                let labels = &[("drive", drive.as_str()), ("store", store.as_str()), ("core", core.as_str())];
                let v = &shard.view;
                table.gauge("penstock_store_oplog_bytes", "Size of the oplog", labels, (v.ring_blocks * 4096) as f64);
                table.gauge("penstock_store_oplog_used_bytes", "Oplog that cannot be reused yet", labels, (v.ring_used * 4096) as f64);
                table.gauge(
                    "penstock_store_undrained_extents",
                    "Extents with blocks that are only in the oplog",
                    labels,
                    v.undrained_extents as f64,
                );
                table.gauge("penstock_store_extents", "Extents of the store", labels, v.extents as f64);
                table.gauge("penstock_store_extents_free", "Extents that are free", labels, v.extents_free as f64);
                table.gauge("penstock_store_held", "Host commands and orders not answered yet", labels, v.held as f64);
                for (name, value) in v.counters.rows() {
                    table.counter(&format!("penstock_store_{name}"), "Of the engine, since the store was opened", labels, value);
                }
            }
            for volume in self.volumes.borrow().iter().filter(|(_, one)| one.core == view.index) {
                let (id, one) = volume;
                let Some(shown) = view.volumes.iter().find(|v| v.slot == one.slot) else { continue };
                let id = id.to_string();
                let labels = &[("volume", id.as_str()), ("name", one.name.as_str())];
                for (name, help, value) in [
                    ("penstock_volume_size_bytes", "Size of the volume", one.blocks * BLOCK),
                    (
                        "penstock_volume_allocated_bytes",
                        "Space of extents that are the volume's own",
                        shown.usage.allocated_extents * EXTENT,
                    ),
                    ("penstock_volume_undrained_bytes", "Data that only the oplog holds yet", shown.usage.undrained_blocks * BLOCK),
                ] {
                    table.gauge(name, help, labels, value as f64);
                }
                let c = &shown.counters;
                for (name, help, value) in [
                    ("penstock_volume_reads", "Reads that were answered", c.reads),
                    ("penstock_volume_writes", "Writes that were answered", c.writes),
                    ("penstock_volume_read_bytes", "Bytes read", c.read_bytes),
                    ("penstock_volume_write_bytes", "Bytes written", c.write_bytes),
                    ("penstock_volume_discards", "Discards and write-zeroes", c.discards),
                    ("penstock_volume_flushes", "Flushes", c.flushes),
                    ("penstock_volume_errors", "Commands answered with an error", c.errors),
                ] {
                    table.counter(name, help, labels, value);
                }
                for (name, help, (counts, sum)) in [
                    ("penstock_volume_read_latency_us", "Read latency, submit to completion", &shown.read_buckets),
                    ("penstock_volume_write_latency_us", "Write latency, submit to completion", &shown.write_buckets),
                ] {
                    table.histogram(name, help, labels, counts.clone(), *sum);
                }
            }
        }
        table.into_info(self.incarnation)
    }
}

/// Families in the order in which they first came.
#[derive(Default)]
struct Table {
    families: Vec<MetricFamily>,
    by_name: BTreeMap<String, usize>,
}

fn labels(of: &[(&str, &str)]) -> BTreeMap<String, String> {
    of.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

impl Table {
    fn points(&mut self, name: &str, help: &str, empty: MetricPoints) -> &mut MetricPoints {
        let at = match self.by_name.get(name) {
            Some(&at) => at,
            None => {
                self.families.push(MetricFamily { name: name.to_owned(), help: help.to_owned(), points: empty });
                self.by_name.insert(name.to_owned(), self.families.len() - 1);
                self.families.len() - 1
            }
        };
        &mut self.families[at].points
    }

    fn counter(&mut self, name: &str, help: &str, of: &[(&str, &str)], value: u64) {
        if let MetricPoints::Counter(points) = self.points(name, help, MetricPoints::Counter(Vec::new())) {
            points.push(CounterPoint { labels: labels(of), value });
        }
    }

    fn gauge(&mut self, name: &str, help: &str, of: &[(&str, &str)], value: f64) {
        if let MetricPoints::Gauge(points) = self.points(name, help, MetricPoints::Gauge(Vec::new())) {
            points.push(GaugePoint { labels: labels(of), value });
        }
    }

    fn histogram(&mut self, name: &str, help: &str, of: &[(&str, &str)], counts: Vec<u64>, sum: f64) {
        if let MetricPoints::Histogram(points) = self.points(name, help, MetricPoints::Histogram(Vec::new())) {
            let bounds = LATENCY_BOUNDS_US.iter().map(|&b| b as f64).collect();
            points.push(HistogramPoint { labels: labels(of), bounds, counts, sum });
        }
    }

    fn into_info(self, incarnation: u64) -> MetricsInfo {
        MetricsInfo { incarnation, families: self.families }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_of_one_name_are_one_family() {
        let mut table = Table::default();
        table.counter("a", "h", &[("core", "0")], 1);
        table.gauge("b", "h", &[], 0.5);
        table.counter("a", "h", &[("core", "1")], 2);
        let info = table.into_info(7);
        assert_eq!((info.incarnation, info.families.len()), (7, 2));
        assert!(matches!(&info.families[0].points, MetricPoints::Counter(points) if points.len() == 2 && points[1].value == 2));
    }
}
