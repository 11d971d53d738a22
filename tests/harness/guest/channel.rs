//! The host's end of the line to the agent in a guest: sends scripts, collects answers by request.

use super::proto::{Outcome, Reply, Request};
use super::wait::Deadline;
use super::{GuestError, Result};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

#[derive(Default)]
struct Heard {
    kernel: Option<String>,
    outcomes: HashMap<u64, Outcome>,
    closed: Option<String>,
}

#[derive(Default)]
struct Inbox {
    heard: Mutex<Heard>,
    changed: Condvar,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn change(&self, edit: impl FnOnce(&mut Heard)) {
        edit(&mut self.lock());
        self.changed.notify_all();
    }
}

/// A script running in the guest; collect it with [`Channel::finish`].
#[derive(Debug)]
#[must_use = "a job that nobody collects may have failed unseen"]
pub struct Job {
    id: u64,
    limit: Duration,
    what: String,
}

pub struct Channel {
    line: UnixStream,
    inbox: Arc<Inbox>,
    next_id: u64,
}

impl Channel {
    /// Takes over a connected line; a thread reads it until the guest is gone.
    pub fn new(line: UnixStream) -> std::io::Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let reader = BufReader::new(line.try_clone()?);
        let for_thread = Arc::clone(&inbox);
        std::thread::Builder::new().name("guest-line".into()).spawn(move || read_all(reader, &for_thread))?;
        Ok(Channel { line, inbox, next_id: 1 })
    }

    /// Waits for the agent's first words; answers the guest kernel's release.
    pub fn hello(&self, deadline: Deadline) -> Result<String> {
        self.wait("the guest's agent to come up", deadline, |heard| heard.kernel.clone())
    }

    /// Starts `script` in the guest, which kills it after `limit`.
    pub fn start(&mut self, script: &str, limit: Duration) -> Result<Job> {
        let id = self.next_id;
        self.next_id += 1;
        let request = Request { id, script: script.to_owned(), limit_ms: limit.as_millis() as u64 };
        let mut text = serde_json::to_vec(&request).expect("requests are plain data");
        text.push(b'\n');
        self.line.write_all(&text).map_err(|e| GuestError::failed("sending a script to the guest", e.to_string()))?;
        Ok(Job { id, limit, what: first_line(script) })
    }

    /// Waits for the job's end. An answer without status means the guest killed it at its limit.
    pub fn finish(&self, job: Job) -> Result<Outcome> {
        // the guest enforces the limit on its own clock; the margin is for a guest that has died
        let deadline = Deadline::after(job.limit + Duration::from_secs(30));
        let mut outcome = None;
        self.wait(&format!("guest script `{}`", job.what), deadline, |heard| {
            outcome = heard.outcomes.remove(&job.id);
            outcome.is_some().then_some(())
        })?;
        Ok(outcome.expect("set when the wait succeeded"))
    }

    /// Whether the job has ended, without collecting it.
    pub fn ended(&self, job: &Job) -> bool {
        let heard = self.inbox.lock();
        heard.outcomes.contains_key(&job.id) || heard.closed.is_some()
    }

    fn wait<T>(&self, what: &str, mut deadline: Deadline, mut look: impl FnMut(&mut Heard) -> Option<T>) -> Result<T> {
        let mut heard = self.inbox.lock();
        loop {
            if let Some(found) = look(&mut heard) {
                return Ok(found);
            }
            if let Some(why) = &heard.closed {
                return Err(GuestError::failed(what, format!("the guest is gone: {why}")));
            }
            if deadline.passed() {
                return Err(deadline.timeout(what, ""));
            }
            heard = self.inbox.changed.wait_timeout(heard, deadline.look()).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

fn first_line(script: &str) -> String {
    script.trim().lines().next().unwrap_or_default().chars().take(80).collect()
}

fn read_all(reader: BufReader<UnixStream>, inbox: &Inbox) {
    let mut why = "end of the line".to_owned();
    for line in reader.lines() {
        match line {
            Ok(text) => match serde_json::from_str::<Reply>(&text) {
                Ok(Reply::Hello { kernel }) => inbox.change(|heard| heard.kernel = Some(kernel)),
                Ok(Reply::Done(outcome)) => inbox.change(|heard| drop(heard.outcomes.insert(outcome.id, outcome))),
                Err(error) => {
                    why = format!("not a reply: {error}");
                    break;
                }
            },
            Err(error) => {
                why = error.to_string();
                break;
            }
        }
    }
    inbox.change(|heard| heard.closed = Some(why));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    #[test]
    fn finish_with_answers_out_of_order_gives_each_job_its_own() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(host).unwrap();
        let one = channel.start("one", Duration::from_secs(10)).unwrap();
        let two = channel.start("two", Duration::from_secs(10)).unwrap();
        for (id, out) in [(2, "second"), (1, "first")] {
            let reply = Reply::Done(Outcome { id, status: Some(0), out: out.into(), err: String::new() });
            writeln!(guest, "{}", serde_json::to_string(&reply).unwrap()).unwrap();
        }
        assert_eq!(channel.finish(one).unwrap().out, "first");
        assert_eq!(channel.finish(two).unwrap().out, "second");
    }

    #[test]
    fn wait_when_the_guest_dies_ends_at_once_and_says_so() {
        let (host, guest) = UnixStream::pair().unwrap();
        let channel = Channel::new(host).unwrap();
        drop(guest);
        let err = channel.hello(second()).unwrap_err();
        assert!(err.to_string().contains("the guest is gone"), "{err}");
    }
}
