//! At the end of some seeds: all nodes but one are lost, what is left is told to go on alone, and then the lost ones come back, when nobody wants to hear of
//! them any more.
//!
//! Everything is at rest when they are lost, so nothing that was acknowledged is: what the receipt calls sure is all there is, and hosts find it.
//! Not here: losses under load, of which the receipt tells.

use penstock_engine::{Order, Receipt};

use super::calm::PATIENCE_US;
use super::node::Gone;
use super::world::{Coming, World};
use crate::orders::segment_of;

impl World {
    pub fn lose_majority(&mut self) {
        // Who goes on alone must have content.
        if self.plan.log_only || self.plan.singles > 0 || self.whole_nodes().len() < self.nodes.len() || !self.rng.one_in(3) {
            return;
        }
        let left = self.rng.below(self.nodes.len() as u64) as usize;
        self.tally.fault("all nodes but one lost for good (16)");
        for node in (0..self.nodes.len()).filter(|node| *node != left) {
            self.nodes[node].lost = true;
            let power = self.rng.one_in(2);
            self.die(node, power);
            // From here on nothing that it says in a group is to be heard.
            self.nodes[node].gone = Some(Gone::Lost);
        }
        // What is heard of the lost after the order counts as an answer, and the order is refused: rightly, for nobody can tell how old it is.
        self.until(PATIENCE_US, "the last words of the lost have come", |w| {
            (0..w.nodes.len()).all(|node| !w.nodes[node].lost || !w.is_on_its_way(node))
        });
        for volume in self.groups() {
            self.recover_alone(left, volume);
        }
        self.until(PATIENCE_US, "what is left leads alone", |w| w.groups().into_iter().all(|volume| w.leader_of(volume) == Some(left)));
        self.read_back();
        self.resting = false;
        self.groups().into_iter().for_each(|volume| self.after(1, Coming::Think { volume }));
        let served = self.served;
        self.until(PATIENCE_US, "hosts go on with what is left", |w| w.served >= served + 10);
        for node in (0..self.nodes.len()).filter(|node| *node != left) {
            self.nodes[node].lost = false;
            let when = self.rng.within(0, 200_000);
            self.after(when, Coming::Start { node });
        }
        self.until(PATIENCE_US, "lost members that come back are stopped (12)", World::gone_are_out);
        self.tally.check("lost members are fenced (12)");
        self.resting = true;
        self.until(PATIENCE_US, "every command is answered after the loss", |w| w.nodes.iter().all(|it| it.ios.is_empty()));
        self.read_back();
    }

    /// Its process may die in the middle of that, and is told again then.
    fn recover_alone(&mut self, node: usize, volume: u32) {
        let order = Order::Recover { segment: segment_of(volume), regardless: false };
        if self.rng.one_in(2) {
            self.order(node, order.clone());
            let end = self.now + self.rng.pick(&[2_000_000, 2_010_000, 2_100_000, 3_000_000]) + self.rng.below(20_000);
            while self.now < end && self.step() {}
            self.tally.fault("death during a recovery by force (17)");
            self.die(node, true);
            self.until(PATIENCE_US, "what is left serves again", |w| {
                w.nodes[node]
                    .replica_of(volume)
                    .is_some_and(|no| w.nodes[node].store.as_ref().is_some_and(|store| store.look(no).is_some()))
                    && w.nodes[node].phase == super::node::Phase::Serving
            });
        }
        let last = self.nodes[node].replica_of(volume).and_then(|no| self.nodes[node].store.as_ref()?.look(no)).map(|look| look.last);
        // A node that just came up without the others is vouched for by its own state, or nobody would know.
        self.order_well(node, order, "the recovery is done");
        assert!(
            self.receipts.remove(&volume).is_some_and(|receipt: Box<Receipt>| Some(receipt.last.index) >= last),
            "no receipt, or of less than there is"
        );
        self.tally.check("a receipt covers what was at rest (16)");
    }
}
