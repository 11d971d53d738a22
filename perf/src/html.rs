//! A run as one HTML page that needs nothing from outside: the percentile curve and the course over time as inline SVG.
//!
//! Deliberately without scripts: it opens from a mail or an archive, years later.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use crate::report::{KindReport, Report, TimelinePoint};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 44.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

struct Frame {
    x_max: f64,
    y_min: f64,
    y_max: f64,
}

impl Frame {
    fn x(&self, value: f64) -> f64 {
        LEFT + value / self.x_max * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value - self.y_min) / (self.y_max - self.y_min);
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }

    fn open(&self, out: &mut String, label: &str) {
        let _ = write!(out, r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#, escape(label));
    }

    fn grid_x(&self, out: &mut String, at: f64, text: &str) {
        let (x, y1, y2) = (self.x(at), TOP, HEIGHT - BOTTOM);
        let _ = write!(
            out,
            r#"<line class="g" x1="{x:.1}" y1="{y1:.1}" x2="{x:.1}" y2="{y2:.1}"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{text}</text>"#,
            y2 + 16.0
        );
    }

    fn grid_y(&self, out: &mut String, at: f64, text: &str) {
        let (y, x2) = (self.y(at), WIDTH - RIGHT);
        let _ = write!(
            out,
            r#"<line class="g" x1="{LEFT}" y1="{y:.1}" x2="{x2}" y2="{y:.1}"/><text x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#,
            LEFT - 8.0,
            y + 4.0
        );
    }

    fn caption_x(&self, out: &mut String, text: &str) {
        let _ = write!(
            out,
            r#"<text class="c" x="{:.1}" y="{:.1}" text-anchor="middle">{text}</text>"#,
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 8.0
        );
    }

    fn line(&self, out: &mut String, class: &str, points: &[(f64, f64)]) {
        let mut path = String::new();
        for (index, (x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{:.1} {:.1}", if index == 0 { "M" } else { "L" }, self.x(*x), self.y(*y));
        }
        let _ = write!(out, r#"<path class="{class}" d="{path}"/>"#);
    }
}

fn shown_us(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{:.3} s", us / 1e6),
        us if us >= 1e3 => format!("{:.2} ms", us / 1e3),
        us => format!("{us:.1} µs"),
    }
}

/// Latency over percentile; both axes logarithmic, the horizontal one in 1/(1 − percentile).
fn percentile_curve(histogram: &Histogram<u64>) -> String {
    if histogram.is_empty() {
        return "<p>No operation completed.</p>".to_owned();
    }
    let nines = |quantile: f64| -(1.0 - quantile).log10();
    let last = 1.0 - 1.0 / (histogram.len() as f64).max(10.0);
    let points: Vec<(f64, f64)> = histogram
        .iter_quantiles(20)
        .map(|step| (nines(step.quantile_iterated_to().min(last)), (step.value_iterated_to() as f64 / 1e3).max(0.001).log10()))
        .collect();
    let (y_min, y_max) = points.iter().fold((f64::MAX, f64::MIN), |(low, high), (_, y)| (low.min(*y), high.max(*y)));
    let frame = Frame { x_max: nines(last), y_min: y_min.floor(), y_max: y_max.ceil().max(y_min.floor() + 1.0) };
    let mut out = String::new();
    frame.open(&mut out, "latency by percentile");
    let marks = [(0.0, "0 %"), (0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %"), (0.99999, "99.999 %")];
    for (quantile, text) in marks.iter().filter(|(quantile, _)| *quantile <= last) {
        frame.grid_x(&mut out, nines(*quantile), text);
    }
    let mut decade = frame.y_min;
    while decade <= frame.y_max {
        frame.grid_y(&mut out, decade, &shown_us(10f64.powf(decade)));
        decade += 1.0;
    }
    frame.caption_x(&mut out, "percentile");
    frame.line(&mut out, "l", &points);
    for (quantile, text) in marks.iter().filter(|(quantile, _)| *quantile > 0.0 && *quantile <= last) {
        let us = histogram.value_at_quantile(*quantile) as f64 / 1e3;
        let (x, y) = (frame.x(nines(*quantile)), frame.y(us.max(0.001).log10()));
        let _ = write!(out, r#"<circle class="d" cx="{x:.1}" cy="{y:.1}" r="4"><title>{text}: {}</title></circle>"#, shown_us(us));
    }
    out.push_str("</svg>");
    out
}

/// A step of 1, 2 or 5 times a power of ten that cuts `span` into about `parts`.
fn round_step(span: f64, parts: f64) -> f64 {
    let raw = (span / parts).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(raw.log10().floor());
    let lead = [1.0, 2.0, 5.0, 10.0].into_iter().find(|lead| raw <= lead * power).unwrap_or(10.0);
    lead * power
}

fn shown_count(count: f64) -> String {
    match count {
        count if count >= 1e6 => format!("{:.1} M", count / 1e6),
        count if count >= 1e3 => format!("{:.0} k", count / 1e3),
        count => format!("{count:.0}"),
    }
}

/// IOPS over time: a stall or a killed target shows as a hole.
fn course(timeline: &[TimelinePoint]) -> String {
    if timeline.len() < 2 {
        return String::new();
    }
    let top = timeline.iter().map(|point| point.iops).fold(1.0, f64::max);
    let step = round_step(top, 5.0);
    let frame = Frame { x_max: timeline[timeline.len() - 1].at_s, y_min: 0.0, y_max: (top / step).ceil() * step };
    let mut out = String::from("<h2>IOPS over time</h2>");
    frame.open(&mut out, "IOPS over time");
    let marks = (frame.y_max / step).round() as u32;
    for mark in 0..=marks {
        frame.grid_y(&mut out, f64::from(mark) * step, &shown_count(f64::from(mark) * step));
    }
    let step = round_step(frame.x_max, 8.0);
    for mark in 0..=(frame.x_max / step) as u32 {
        frame.grid_x(&mut out, f64::from(mark) * step, &format!("{}", (f64::from(mark) * step * 100.0).round() / 100.0));
    }
    frame.caption_x(&mut out, "seconds");
    let points: Vec<(f64, f64)> = timeline.iter().map(|point| (point.at_s, point.iops)).collect();
    frame.line(&mut out, "l", &points);
    out.push_str("</svg>");
    out
}

fn row(name: &str, kind: &KindReport) -> String {
    let lat = &kind.latency_us;
    let mut out = format!("<tr><th>{name}</th><td>{}</td><td>{:.0}</td><td>{:.1}</td>", kind.operations, kind.iops, kind.mib_per_s);
    for us in [lat.mean, lat.p50, lat.p90, lat.p99, lat.p999, lat.p9999, lat.max] {
        let _ = write!(out, "<td>{}</td>", shown_us(us));
    }
    let _ = write!(out, "<td>{}</td></tr>", kind.errors);
    out
}

const STYLE: &str = "\
:root{--ink:#1b1f24;--paper:#fff;--faint:#d8dde3;--dim:#5a6570;--line:#0b6bcb}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#15181c;--faint:#333a42;--dim:#9aa5b1;--line:#5cb0ff}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.3rem;margin-bottom:.2rem}h2{font-size:1.05rem;margin-top:2rem}p{margin:.2rem 0;color:var(--dim)}\
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.88rem}\
th,td{padding:.3rem .5rem;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}th:first-child{text-align:left}\
svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--dim)}svg .c{font-size:12px}\
.g{stroke:var(--faint);stroke-width:1}.l{fill:none;stroke:var(--line);stroke-width:2;stroke-linejoin:round}.d{fill:var(--line)}\
pre{white-space:pre-wrap;font-size:.85rem}";

/// The whole page.
pub fn page(report: &Report) -> String {
    let title = escape(&format!("penstock-perf: {}", report.target));
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style></head><body><h1>{}</h1><p>{}, {:.2} s</p>\
         <p>{} device, {} B blocks; longest gap between completions {:.1} ms</p>",
        escape(&report.target),
        escape(&report.headline()),
        report.duration_s,
        report.device_bytes,
        report.device_block_bytes,
        report.longest_gap_ms,
    );
    out.push_str("<h2>Latency by percentile</h2>");
    out.push_str(&percentile_curve(&report.histogram));
    out.push_str(&course(&report.timeline));
    out.push_str("<h2>Figures</h2><table><thead><tr><th></th>");
    for head in ["operations", "IOPS", "MiB/s", "mean", "p50", "p90", "p99", "p99.9", "p99.99", "max", "errors"] {
        let _ = write!(out, "<th>{head}</th>");
    }
    out.push_str("</tr></thead><tbody>");
    for (name, kind) in [("read", &report.read), ("write", &report.write), ("trim", &report.trim)] {
        if let Some(kind) = kind {
            out.push_str(&row(name, kind));
        }
    }
    out.push_str(&row("all", &report.total));
    out.push_str("</tbody></table>");
    if report.verified_blocks_in_run > 0 || report.verify.is_some() {
        let text = report.verify.as_ref().map(crate::report::verify_text).unwrap_or_default();
        let _ = write!(
            out,
            "<h2>Verification</h2><pre>read back in the run: {} blocks, {} bad\n{}</pre>",
            report.verified_blocks_in_run,
            report.bad_in_run.count,
            escape(&text)
        );
    }
    out.push_str("</body></html>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn page_needs_nothing_from_outside() {
        let page = page(&report());
        for outside in ["http:", "https:", "src=", "href=", "<script", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn page_shows_curve_course_and_figures_and_escapes_names() {
        let page = page(&report());
        assert!(page.contains("bdev:&lt;Malloc0&gt;") && !page.contains("<Malloc0>"));
        assert_eq!(page.matches("<svg").count(), 2);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("99.9 %: 9.99 ms") || page.contains("99.9 %: 10.00 ms"), "a point on the curve names its value");
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }

    #[test]
    fn page_of_a_run_without_completions_says_so() {
        let mut empty = report();
        empty.histogram.reset();
        empty.timeline.clear();
        let page = page(&empty);
        assert!(page.contains("No operation completed") && !page.contains("NaN"));
    }

    #[test]
    fn steps_are_round() {
        for (span, parts, step) in [(10.0, 5.0, 2.0), (437_000.0, 5.0, 100_000.0), (0.9, 8.0, 0.2)] {
            assert!((round_step(span, parts) - step).abs() < step * 1e-9, "{span}");
        }
    }
}
