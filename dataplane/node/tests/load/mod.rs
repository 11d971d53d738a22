//! A node in the test's process with one volume, and a load that polls on the volume's home core until it calls `inproc::stop`.

use std::cell::RefCell;
use std::sync::mpsc;

use penstock_node::inproc::{self, Activity, Options, Poller, Volume};

thread_local! {
    // Dropped by the end of the core's thread.
    static POLLER: RefCell<Option<Poller>> = const { RefCell::new(None) };
}

/// Runs what `make` makes of the volume. Bytes throughout.
pub fn run<L>(drive: &str, volume_bytes: u64, oplog_bytes: u64, make: impl FnOnce(Volume) -> L + Send + 'static)
where
    L: FnMut() -> Activity + 'static,
{
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut options = Options::new(drive.parse().expect("a spec"), scratch.path().to_owned());
    options.volume_bytes = volume_bytes;
    options.oplog_bytes = Some(oplog_bytes);
    let (trouble, troubles) = mpsc::channel();
    inproc::run(options, move |ready| match ready {
        Ok(volume) => POLLER.set(Some(Poller::busy("load", make(volume)).expect("a poller"))),
        Err(why) => {
            let _ = trouble.send(why);
            inproc::stop();
        }
    })
    .expect("the node runs and stops");
    assert_eq!(troubles.try_recv().ok(), None);
}
