//! Any sequence of commands of several hosts against an oracle that is written down the other way round: who is registered with what, who holds
//! what, and the specification's sentences in their order, with nothing shared with the rules but the types.

use super::*;
use ReservationKind::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Rights by kind of reservation: (holder, registrant, other), each (reads, writes); figure 620 of the specification.
const RIGHTS: [(ReservationKind, [(bool, bool); 3]); 6] = [
    (WriteExclusive, [(true, true), (true, false), (true, false)]),
    (ExclusiveAccess, [(true, true), (false, false), (false, false)]),
    (WriteExclusiveRegistrants, [(true, true), (true, true), (true, false)]),
    (ExclusiveAccessRegistrants, [(true, true), (true, true), (false, false)]),
    (WriteExclusiveAll, [(true, true), (true, true), (true, false)]),
    (ExclusiveAccessAll, [(true, true), (true, true), (false, false)]),
];

#[derive(Clone, Default, Debug)]
struct Oracle {
    keys: BTreeMap<HostId, u64>,
    kind: Option<ReservationKind>,
    /// Those who hold it, each by himself.
    holders: Vec<HostId>,
    generation: u32,
}

impl Oracle {
    fn is_all(&self) -> bool {
        matches!(self.kind, Some(WriteExclusiveAll | ExclusiveAccessAll))
    }

    fn unregister(&mut self, hosts: &[HostId]) {
        for host in hosts {
            self.keys.remove(host);
            self.holders.retain(|holder| holder != host);
        }
        if self.holders.is_empty() {
            self.kind = None;
        }
    }

    fn register(&mut self, host: HostId, key: u64) {
        self.keys.insert(host, key);
        if self.is_all() {
            self.holders.push(host);
        }
    }

    fn take(&mut self, host: HostId, kind: ReservationKind) {
        self.kind = Some(kind);
        self.holders = if self.is_all() { self.keys.keys().copied().collect() } else { vec![host] };
    }

    fn run(&mut self, host: HostId, what: Reserve) -> Status {
        let before = self.clone();
        let status = self.try_run(host, what);
        if status != Status::Ok {
            *self = before;
        } else if !matches!(what, Reserve::Acquire { .. } | Reserve::Release { .. }) {
            self.generation = before.generation.wrapping_add(1);
        }
        status
    }

    fn try_run(&mut self, host: HostId, what: Reserve) -> Status {
        let mine = self.keys.get(&host).copied();
        let knows = |key: u64| mine == Some(key);
        match what {
            Reserve::Report { .. } => Status::Ok,
            Reserve::Register { new } => {
                if new == 0 {
                    return Status::Invalid;
                }
                if mine.is_some() && mine != Some(new) {
                    return Status::Conflict;
                }
                if mine.is_none() {
                    self.register(host, new);
                }
                Status::Ok
            }
            Reserve::Unregister { key } => {
                if mine.is_none() || key.is_some() && key != mine {
                    return Status::Conflict;
                }
                self.unregister(&[host]);
                Status::Ok
            }
            Reserve::Replace { key, new } => {
                if new == 0 {
                    return Status::Invalid;
                }
                match (mine, key) {
                    (None, Some(_)) => return Status::Conflict,
                    (None, None) => self.register(host, new),
                    (Some(_), Some(key)) if !knows(key) => return Status::Conflict,
                    (Some(_), _) => _ = self.keys.insert(host, new),
                }
                Status::Ok
            }
            Reserve::Acquire { key, kind } => {
                if !knows(key) {
                    return Status::Conflict;
                }
                if self.kind.is_none() {
                    self.take(host, kind);
                    return Status::Ok;
                }
                let again = self.holders.contains(&host) && self.kind == Some(kind);
                if again { Status::Ok } else { Status::Conflict }
            }
            Reserve::Release { key, kind } => {
                if !knows(key) {
                    return Status::Conflict;
                }
                if !self.holders.contains(&host) {
                    return Status::Ok;
                }
                if self.kind != Some(kind) {
                    return Status::Invalid;
                }
                (self.kind, self.holders) = (None, Vec::new());
                Status::Ok
            }
            Reserve::Clear { key } => {
                if !knows(key) {
                    return Status::Conflict;
                }
                *self = Oracle { generation: self.generation, ..Oracle::default() };
                Status::Ok
            }
            Reserve::Preempt { key, victim, kind } => {
                if !knows(key) {
                    return Status::Conflict;
                }
                let named: Vec<HostId> = self.keys.iter().filter(|(_, key)| **key == victim).map(|(host, _)| *host).collect();
                let others = |hosts: &[HostId]| hosts.iter().copied().filter(|other| *other != host).collect::<Vec<_>>();
                if self.is_all() && victim == 0 {
                    let everybody: Vec<HostId> = self.keys.keys().copied().collect();
                    self.unregister(&others(&everybody));
                    self.take(host, kind);
                } else if self.kind.is_some() && !self.is_all() && named.contains(&self.holders[0]) {
                    self.unregister(&others(&named));
                    self.take(host, kind);
                } else if victim == 0 {
                    return Status::Invalid;
                } else if named.is_empty() {
                    return Status::Conflict;
                } else {
                    self.unregister(&named);
                }
                Status::Ok
            }
        }
    }

    fn rights(&self, host: HostId) -> (bool, bool) {
        let Some(kind) = self.kind else { return (true, true) };
        let row = RIGHTS.iter().find(|(of, _)| *of == kind).unwrap().1;
        row[if self.holders.contains(&host) {
            0
        } else if self.keys.contains_key(&host) {
            1
        } else {
            2
        }]
    }
}

fn host(no: u8) -> HostId {
    HostId([no; 16])
}

fn key() -> impl Strategy<Value = u64> {
    0..4u64
}

fn kind() -> impl Strategy<Value = ReservationKind> {
    (0..6usize).prop_map(|at| ReservationKind::ALL[at])
}

fn command() -> impl Strategy<Value = Reserve> {
    let known = || proptest::option::of(key());
    prop_oneof![
        3 => key().prop_map(|new| Reserve::Register { new }),
        1 => known().prop_map(|key| Reserve::Unregister { key }),
        1 => (known(), key()).prop_map(|(key, new)| Reserve::Replace { key, new }),
        3 => (key(), kind()).prop_map(|(key, kind)| Reserve::Acquire { key, kind }),
        2 => (key(), key(), kind()).prop_map(|(key, victim, kind)| Reserve::Preempt { key, victim, kind }),
        2 => (key(), kind()).prop_map(|(key, kind)| Reserve::Release { key, kind }),
        1 => key().prop_map(|key| Reserve::Clear { key }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_commands_of_any_hosts_end_as_the_oracle_says(list in proptest::collection::vec((1..5u8, command()), 1..60)) {
        let (mut state, mut oracle) = (Reservations::default(), Oracle::default());
        for (no, what) in list {
            let ruled = rule(&state, host(no), what);
            let expected = oracle.run(host(no), what);
            prop_assert_eq!(ruled.as_ref().err().copied().unwrap_or(Status::Ok), expected, "{:?} by {}", what, no);
            if let Ok(Some(next)) = ruled {
                state = next;
            }
            // It is one that a volume can have, and it goes through its bytes.
            prop_assert_eq!(&Reservations::decode(&state.encode()).unwrap(), &state);
            prop_assert_eq!(state.generation, oracle.generation);
            prop_assert_eq!(state.held.map(|(kind, _)| kind), oracle.kind);
            for no in 1..5 {
                prop_assert_eq!(state.registrant(host(no)).map(|registrant| registrant.key), oracle.keys.get(&host(no)).copied());
                prop_assert_eq!(holds(&state, host(no)), oracle.holders.contains(&host(no)));
                prop_assert_eq!((permits(&state, host(no), false), permits(&state, host(no), true)), oracle.rights(host(no)));
            }
        }
    }
}

#[test]
fn host_without_a_name_and_one_too_many_are_refused() {
    let mut state = Reservations::default();
    assert_eq!(rule(&state, HostId::default(), Reserve::Register { new: 1 }), Err(Status::Invalid));
    for no in 1..=REGISTRANTS_MAX as u8 {
        state = rule(&state, host(no), Reserve::Register { new: 1 }).unwrap().unwrap();
    }
    assert_eq!(rule(&state, host(200), Reserve::Register { new: 1 }), Err(Status::NoSpace));
    assert_eq!(rule(&state, host(200), Reserve::Replace { key: None, new: 1 }), Err(Status::NoSpace));
}

#[test]
fn report_names_generation_kind_registrants_and_who_holds() {
    let mut state = rule(&Reservations::default(), host(1), Reserve::Register { new: 0x0102_0304_0506_0708 }).unwrap().unwrap();
    state = rule(&state, host(2), Reserve::Register { new: 9 }).unwrap().unwrap();
    let empty = report(&state);
    assert_eq!((empty.len(), empty[4]), (192, 0));
    state = rule(&state, host(2), Reserve::Acquire { key: 9, kind: ExclusiveAccess }).unwrap().unwrap();
    let bytes = report(&state);
    assert_eq!(bytes[..10], [2, 0, 0, 0, 2, 2, 0, 0, 0, 1], "generation, kind, registrants, lasting");
    assert_eq!(bytes[64..72], [0xff, 0xff, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[72..80], 0x0102_0304_0506_0708u64.to_le_bytes());
    assert_eq!(bytes[80..96], [1; 16]);
    assert_eq!((bytes[128 + 2], &bytes[144..160]), (1, &[2; 16][..]));
}
