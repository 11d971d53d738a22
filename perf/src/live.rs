//! The line that shows a load while it runs: on a terminal it stays in place, in a log it is printed once a second.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::sample::Sample;
use crate::units::Nanos;
use crate::workload::OpKind;

/// Silence worth mentioning.
const SILENCE_SHOWN: Nanos = Nanos(500_000_000);

/// What the line shows.
pub struct LiveLine {
    bar: ProgressBar,
    is_terminal: bool,
    is_quiet: bool,
    started: Instant,
    last_printed: Option<Instant>,
    label: String,
    was_silent: bool,
}

fn short_count(count: f64) -> String {
    match count {
        count if count >= 1e6 => format!("{:.2}M", count / 1e6),
        count if count >= 1e3 => format!("{:.1}k", count / 1e3),
        count => format!("{count:.0}"),
    }
}

/// One window in one line.
pub fn window_text(window: &Sample) -> String {
    let mut text = String::new();
    for kind in OpKind::ALL {
        let sample = window.kind(kind);
        if sample.operations + sample.errors > 0 {
            let per_s = sample.operations as f64 / window.span().as_secs_f64().max(1e-9);
            text.push_str(&format!("{} {} IOPS  ", kind.name(), short_count(per_s)));
        }
    }
    let latency = window.latency();
    let at = |quantile| Nanos(latency.value_at_quantile(quantile));
    text.push_str(&format!(
        "{:.0} MiB/s  p50 {}  p99 {}  max {}",
        window.bandwidth() / f64::from(1 << 20),
        at(0.5),
        at(0.99),
        Nanos(latency.max())
    ));
    if window.errors() > 0 {
        text.push_str(&format!("  {} ERRORS", window.errors()));
    }
    text
}

impl LiveLine {
    pub fn new(label: &str, is_quiet: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = if is_terminal && !is_quiet {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("a constant template is valid"));
            bar
        } else {
            ProgressBar::hidden()
        };
        Self { bar, is_terminal, is_quiet, started: Instant::now(), last_printed: None, label: label.to_owned(), was_silent: false }
    }

    /// Shows a window. A silent target is said so, and so is its return.
    pub fn window(&mut self, window: &Sample, silence: Nanos, is_draining: bool) {
        let is_silent = silence > SILENCE_SHOWN;
        if self.was_silent && !is_silent {
            self.say("completions again");
        }
        let text = match (is_silent, is_draining) {
            (true, _) => format!("no completion for {silence}"),
            (false, true) => "waiting for what is outstanding".to_owned(),
            (false, false) => window_text(window),
        };
        let is_due = self.last_printed.is_none_or(|at| at.elapsed() >= Duration::from_millis(950)) || is_silent != self.was_silent;
        self.was_silent = is_silent;
        let line = format!("{:>6.1} s  {}  {text}", self.started.elapsed().as_secs_f64(), self.label);
        if self.is_terminal {
            self.bar.set_message(line);
            self.bar.tick();
        } else if is_due && !self.is_quiet {
            self.last_printed = Some(Instant::now());
            eprintln!("{line}");
        }
    }

    /// A line that stays.
    pub fn say(&self, text: &str) {
        let line = format!("{:>6.1} s  {}  {text}", self.started.elapsed().as_secs_f64(), self.label);
        if self.is_terminal && !self.is_quiet {
            self.bar.println(line);
        } else if !self.is_quiet {
            eprintln!("{line}");
        }
    }

    pub fn close(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_shows_each_kind_rate_latency_and_errors() {
        let mut window = Sample { from: Nanos(0), until: Nanos(500_000_000), ..Sample::default() };
        for _ in 0..1_000 {
            window.kind_mut(OpKind::Write).done(4096, Nanos(20_000));
        }
        window.kind_mut(OpKind::Read).errors = 2;
        let text = window_text(&window);
        for part in ["write 2.0k IOPS", "read 0 IOPS", "8 MiB/s", "p99 20.0 µs", "2 ERRORS"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("trim"));
    }
}
