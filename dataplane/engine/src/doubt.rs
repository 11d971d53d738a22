//! A member whose recovery found records that it cannot judge: it asks the others before its group is built, and neither votes nor campaigns
//! meanwhile. The judgement itself is a table ([`crate::replica::resolve`]); this is the asking.

use crate::replica::Recovered;
use crate::replica::resolve::{Answer, Unknown};
use penstock_wire::peer::{Entry, MemberNo};

/// What was found, and what the others have said of it.
#[derive(Debug)]
pub(crate) struct Doubts {
    pub recovered: Recovered,
    pub unknown: Unknown,
    pub answers: Vec<(MemberNo, Answer, Vec<Entry>)>,
}
