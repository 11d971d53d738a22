//! House rules that a machine can check (STYLE.md, ARCHITECTURE.md). They only ratchet: a rule here is never loosened to let a
//! change in. Each check has a test beneath that shows it failing.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a source file at most.
const LINES_MAX: usize = 900;

/// Crates that must stay pure: no I/O, clock, randomness, threads or async.
const PURE: [&str; 3] = ["dataplane/wire", "dataplane/engine", "control/model"];

/// Who may import whom of ours, by folder. Not listed: nothing of ours.
const MAY_IMPORT: [(&str, &[&str]); 12] = [
    ("dataplane/engine", &["penstock-wire"]),
    ("dataplane/sim", &["penstock-wire", "penstock-engine"]),
    ("dataplane/node", &["penstock-wire", "penstock-engine", "penstock-api", "spdk-rs", "penstock-uring"]),
    ("sys/spdk", &["spdk-sys", "penstock-uring"]),
    ("control/model", &["penstock-api"]),
    ("control/server", &["penstock-model", "penstock-api"]),
    ("control/cli", &["penstock-api"]),
    ("perf", &["spdk-rs", "penstock-node", "penstock-api"]),
    ("", &["penstock-api", "penstock-wire", "penstock-engine"]),
    ("tests/fuzz", &["penstock-api", "penstock-wire", "penstock-engine"]),
    ("sys/ffi", &[]),
    ("hugepages", &[]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file that git would commit: tracked, or new and not ignored.
fn files(ending: &str) -> Vec<(String, String)> {
    let out = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git lists the checkout's files");
    assert!(out.status.success(), "git ls-files: {}", String::from_utf8_lossy(&out.stderr));
    let names = String::from_utf8(out.stdout).expect("names are UTF-8");
    let files: Vec<_> = names
        .lines()
        .filter(|name| name.ends_with(ending))
        .filter_map(|name| Some((name.to_owned(), fs::read_to_string(root().join(name)).ok()?)))
        .collect();
    assert!(!files.is_empty(), "no file ends with {ending}: the check would check nothing");
    files
}

fn fail_on(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

/// Code of a file up to its first test module, without comment lines.
fn shipped(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().take_while(|(_, line)| !line.trim_start().starts_with("#[cfg(test)]")).filter(|(_, line)| !is_comment(line))
}

fn unsafe_lines(text: &str) -> Vec<usize> {
    let starts = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
    text.lines()
        .enumerate()
        .filter(|(_, line)| !is_comment(line) && !line.contains('"') && starts.iter().any(|start| line.contains(start)))
        .map(|(no, _)| no + 1)
        .collect()
}

#[test]
fn unsafe_stands_under_sys_alone() {
    let mut found = Vec::new();
    for (name, text) in files(".rs") {
        if !name.starts_with("sys/") {
            found.extend(unsafe_lines(&text).into_iter().map(|no| format!("{name}:{no}")));
        }
    }
    fail_on("unsafe outside sys/", found);
}

#[test]
fn every_crate_outside_sys_forbids_unsafe() {
    let mut found = Vec::new();
    for (name, _) in files("Cargo.toml") {
        let dir = Path::new(&name).parent().unwrap_or(Path::new(""));
        if dir.starts_with("sys") {
            continue;
        }
        for entry in ["src/lib.rs", "src/main.rs", "tests/harness/lib.rs"] {
            let path = root().join(dir).join(entry);
            if (dir != Path::new("") || entry.starts_with("tests"))
                && let Ok(text) = fs::read_to_string(&path)
                && !text.contains("#![forbid(unsafe_code)]")
            {
                found.push(format!("{}/{entry}", dir.display()));
            }
        }
    }
    fail_on("crate without #![forbid(unsafe_code)]", found);
}

#[test]
fn files_stay_readable_in_one_sitting() {
    let found = files(".rs").into_iter().filter(|(_, text)| text.lines().count() > LINES_MAX);
    fail_on("longer than 900 lines", found.map(|(name, text)| format!("{name}: {}", text.lines().count())).collect());
}

#[test]
fn every_module_says_what_it_is_for() {
    let found = files(".rs").into_iter().filter(|(_, text)| !text.lines().any(|line| line.starts_with("//!")));
    fail_on("no //! at the top", found.map(|(name, _)| name).collect());
}

fn impure(line: &str) -> bool {
    [
        "std::fs",
        "std::net",
        "std::thread",
        "std::time::Instant",
        "SystemTime",
        "std::env",
        "std::process",
        "tokio",
        "rand::",
        "async fn",
        "getrandom",
    ]
    .iter()
    .any(|word| line.contains(word))
}

#[test]
fn pure_crates_touch_no_world() {
    let mut found = Vec::new();
    for (name, text) in files(".rs") {
        if PURE.iter().any(|dir| name.starts_with(&format!("{dir}/src/"))) {
            found.extend(shipped(&text).filter(|(_, line)| impure(line)).map(|(no, line)| format!("{name}:{}: {}", no + 1, line.trim())));
        }
    }
    fail_on("I/O, clock, randomness, threads or async in a pure crate", found);
}

/// Packages of ours that a manifest's `[dependencies]` name.
fn our_imports(manifest: &str) -> Vec<String> {
    let mut section = "";
    let mut found = Vec::new();
    for line in manifest.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name;
        } else if section.starts_with("dependencies")
            && let Some(name) = line.split(['=', '.', ' ']).next()
            && (name.starts_with("penstock-") || name.starts_with("spdk-"))
        {
            found.push(name.to_owned());
        }
    }
    found
}

#[test]
fn crates_import_only_whom_they_may() {
    let mut found = Vec::new();
    for (name, text) in files("Cargo.toml") {
        let dir = Path::new(&name).parent().and_then(Path::to_str).unwrap_or("");
        let allowed = MAY_IMPORT.iter().find(|(of, _)| *of == dir).map_or(&[][..], |(_, allowed)| allowed);
        for import in our_imports(&text) {
            if !allowed.contains(&import.as_str()) {
                found.push(format!("{name} imports {import}; it may import {allowed:?}"));
            }
        }
    }
    fail_on("an import against the house's layers", found);
}

#[test]
fn every_dependency_has_its_reason() {
    let mut found = Vec::new();
    for (name, text) in files("Cargo.toml") {
        let mut section = "";
        // A reason holds for the lines beneath it, up to the next blank one.
        let mut reason = false;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('[') {
                section = name;
            } else if section.contains("dependencies") && line.contains('=') && line.starts_with(|c: char| c.is_ascii_alphabetic()) {
                let ours = line.contains("path =") || line.contains("workspace = true");
                if !ours && !line.contains('#') && !reason {
                    found.push(format!("{name}: {line}"));
                }
            }
            reason = line.starts_with('#') || reason && !line.is_empty();
        }
    }
    fail_on("a dependency without a reason on or above its line", found);
}

fn bad_ignore(line: &str) -> bool {
    line.trim_start().starts_with("#[ignore") && !(line.contains("= \"") && (line.contains("run by make") || line.contains("runs it")))
}

#[test]
fn ignored_tests_say_why_and_what_runs_them() {
    let mut found = Vec::new();
    for (name, text) in files(".rs") {
        found.extend(text.lines().enumerate().filter(|(_, line)| bad_ignore(line)).map(|(no, _)| format!("{name}:{}", no + 1)));
    }
    fail_on("#[ignore] without a reason and a command", found);
}

fn unfinished(line: &str) -> bool {
    ["todo!(", "unimplemented!(", concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")].iter().any(|word| line.contains(word))
}

#[test]
fn nothing_is_left_as_a_note_to_self() {
    let mut found = Vec::new();
    for (name, text) in files(".rs") {
        if name != "tests/tidy.rs" {
            found.extend(
                text.lines()
                    .enumerate()
                    .filter(|(_, line)| unfinished(line))
                    .map(|(no, line)| format!("{name}:{}: {}", no + 1, line.trim())),
            );
        }
    }
    fail_on("unfinished", found);
}

fn blanket_allow(line: &str) -> bool {
    line.trim_start().starts_with("#![allow(")
}

#[test]
fn no_crate_silences_its_warnings() {
    let mut found = Vec::new();
    for (name, text) in files(".rs") {
        // The generated bindings carry C's names; what several test binaries share is used by each in part.
        let shared = name.contains("/tests/") && text.contains("each test binary uses its own part");
        if !shared && name != "sys/ffi/src/lib.rs" {
            found.extend(text.lines().enumerate().filter(|(_, line)| blanket_allow(line)).map(|(no, _)| format!("{name}:{}", no + 1)));
        }
    }
    fail_on("a blanket allow", found);
}

/// Targets of a document's relative links.
fn links(text: &str) -> Vec<&str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', '#']).next())
        .filter(|target| !target.is_empty() && !target.contains("://"))
        .collect()
}

#[test]
fn documents_link_to_what_exists() {
    let mut found = Vec::new();
    for (name, text) in files(".md") {
        let dir = root().join(Path::new(&name).parent().unwrap_or(Path::new("")));
        found.extend(links(&text).into_iter().filter(|target| !dir.join(target).exists()).map(|target| format!("{name} -> {target}")));
    }
    fail_on("a link to nothing", found);
}

#[test]
fn every_check_can_fail() {
    assert_eq!(unsafe_lines("let x = 1;\n    unsafe { y() }\n// unsafe { in a comment }"), [2]);
    assert!(impure("use std::time::Instant;") || impure("let t = std::time::Instant::now();"));
    assert!(impure("std::fs::read(path)") && !impure("let fs = 1;"));
    assert_eq!(
        our_imports("[dependencies]\npenstock-wire = { path = \"../wire\" }\nserde = \"1\"\n[dev-dependencies]\nspdk-rs = \"1\""),
        ["penstock-wire"]
    );
    assert!(bad_ignore("#[ignore]") && bad_ignore("#[ignore = \"slow\"]") && !bad_ignore("#[ignore = \"slow; run by make test-guest\"]"));
    assert!(unfinished("// TODO later") && !unfinished("// done"));
    assert!(blanket_allow("#![allow(dead_code)]") && !blanket_allow("#[allow(dead_code)]"));
    assert_eq!(links("see [a](docs/x.md#part) and [b](https://x.y/z)"), ["docs/x.md"]);
    assert_eq!(shipped("a\n// b\nc\n#[cfg(test)]\nd").map(|(no, _)| no).collect::<Vec<_>>(), [0, 2]);
}
