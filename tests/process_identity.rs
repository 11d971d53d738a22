//! Drives that are not what they were when their node comes back: put back from an older copy, wiped, or swapped for another node's. None of them is believed,
//! `penstock replica ls` says why, and what it says to do helps. Not here: labels that are foreign or unreadable (process_labels), drives that are
//! lost (process_moves).

use penstock::guest::wait::wait_for;
use penstock::process::cluster::{Cluster, VOLUME};
use penstock::process::dice;
use penstock::process::house::LIMIT;
use penstock::process::perf;
use std::path::{Path, PathBuf};

/// Three nodes, a volume that was written to, and the journal of what it holds.
struct Scene {
    cluster: Cluster,
    journal: PathBuf,
    dice: penstock::guest::replay::Dice,
}

impl Scene {
    fn new(what: &str) -> Self {
        let cluster = Cluster::with_volume(3, "64MiB").unwrap();
        let mut scene = Scene { journal: cluster.path("journal"), cluster, dice: dice(what) };
        scene.load("");
        scene
    }

    fn load(&mut self, more: &str) {
        let seed = self.dice.roll();
        let load = format!("--mix 20:70:10 --depth 8 --operations 3000 --no-final-pass --seed {seed} {more}");
        let doors = self.cluster.doors(VOLUME).unwrap();
        perf::finish(perf::start_run_over(&doors, &self.journal, &load).unwrap()).unwrap().expect_ok("a load");
    }

    fn some(&mut self) -> usize {
        1 + self.dice.below(3) as usize
    }

    fn image(&self, at: usize) -> PathBuf {
        self.cluster.path(&format!("n{at}.img"))
    }

    /// Waits until the line of a node's replica has all of this in it.
    fn wait_until_said(&self, at: usize, words: &[&str]) {
        self.wait_until_line(at, &format!("{words:?}"), |line| words.iter().all(|word| line.contains(word)));
    }

    fn wait_until_line(&self, at: usize, what: &str, is_meant: impl Fn(&str) -> bool) {
        let mut last = String::new();
        let said = wait_for("what replica ls says", LIMIT, || {
            last = self.cluster.did(&format!("replica ls {VOLUME}")).out;
            let line = last.lines().find(|line| line.split_whitespace().nth(2) == Some(&format!("n{at}")));
            Ok(line.is_some_and(&is_meant).then_some(()))
        });
        said.unwrap_or_else(|e| panic!("{what} of n{at}: {e}\n{last}\n{}", self.cluster.last_words()));
        println!("{last}");
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap_or_else(|e| panic!("{} to {}: {e}", from.display(), to.display()));
}

#[test]
fn drive_put_back_from_an_older_copy_is_refused_and_its_replica_replaced() {
    let mut scene = Scene::new("drive put back");
    let at = scene.some();
    let (image, older) = (scene.image(at), scene.cluster.path("older.img"));
    scene.cluster.kill(at).unwrap();
    copy(&image, &older);
    scene.cluster.start(at).unwrap();
    scene.cluster.settle(VOLUME).unwrap();
    scene.load("--resume");
    scene.cluster.settle(VOLUME).unwrap();

    scene.cluster.kill(at).unwrap();
    copy(&older, &image);
    scene.cluster.start(at).unwrap();
    scene.wait_until_said(at, &["stopped", "put back from an older copy", "replace this replica"]);
    // It stays so, also after another start, and the volume goes on without it.
    scene.load("--resume");
    scene.cluster.kill(at).unwrap();
    scene.cluster.start(at).unwrap();
    // A checkpoint of its own knows, or it is judged again, by its next opening.
    scene.wait_until_line(at, "refused again", |line| {
        line.contains("for good: replace this replica") || line.contains("opens as generation 3") && line.contains("replace this replica")
    });

    scene.cluster.did(&format!("replica replace {VOLUME} n{at}"));
    scene.cluster.settle_on(VOLUME, &[1, 2, 3]).unwrap();
    scene.load("--resume");
    scene.cluster.settle(VOLUME).unwrap();
    scene.cluster.verify(VOLUME, &scene.journal).unwrap();
}

#[test]
fn wiped_drive_is_not_formatted_and_its_replica_made_anew_when_told() {
    let mut scene = Scene::new("drive wiped");
    let at = scene.some();
    let image = scene.image(at);
    scene.cluster.kill(at).unwrap();
    let size = std::fs::metadata(&image).unwrap().len();
    std::fs::File::create(&image).and_then(|file| file.set_len(size)).unwrap();
    scene.cluster.start(at).unwrap();
    scene.wait_until_said(at, &["blank drive", "left alone"]);
    scene.load("--resume");
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 0), "nobody was told to write there");

    let spec = format!("file:{}", image.display());
    scene.cluster.did(&format!("pool rm {spec} --force"));
    scene.cluster.did(&format!("pool add {spec} --node n{at} --oplog 128MiB"));
    scene.cluster.did(&format!("replica replace {VOLUME} n{at}"));
    scene.cluster.settle_on(VOLUME, &[1, 2, 3]).unwrap();
    scene.cluster.verify(VOLUME, &scene.journal).unwrap();
}

#[test]
fn drives_of_two_nodes_swapped_are_refused_until_they_are_swapped_back() {
    let mut scene = Scene::new("drives swapped");
    let stays = scene.some();
    let two: Vec<usize> = (1..=3).filter(|at| *at != stays).collect();
    scene.cluster.settle(VOLUME).unwrap();
    for round in 0..2 {
        two.iter().for_each(|at| scene.cluster.kill(*at).unwrap());
        let aside = scene.cluster.path("aside.img");
        for (from, to) in [(scene.image(two[0]), aside.clone()), (scene.image(two[1]), scene.image(two[0])), (aside, scene.image(two[1]))] {
            std::fs::rename(&from, &to).unwrap();
        }
        two.iter().for_each(|at| scene.cluster.start(*at).unwrap());
        if round == 0 {
            two.iter().for_each(|at| scene.wait_until_said(*at, &["left alone"]));
            assert_eq!(scene.cluster.leader(VOLUME), None, "one of three is no majority");
        }
    }
    scene.cluster.settle(VOLUME).unwrap();
    scene.load("--resume");
    scene.cluster.settle(VOLUME).unwrap();
    scene.cluster.verify(VOLUME, &scene.journal).unwrap();
}
