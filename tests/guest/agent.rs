//! The agent inside a guest: runs the scripts that the host sends over a virtio-serial port and answers with exit status
//! and output. It is what init executes last, so if it dies the kernel panics and QEMU exits: a loud failure.
//! Not here: mounting, loading modules and the rest of start-up, which is the init script's.
#![forbid(unsafe_code)]

use penstock::guest::proto::{OUTPUT_LIMIT, Outcome, PORT, Reply, Request};
use penstock::guest::rpc::call_json;
use penstock::guest::wait::Deadline;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if !words.is_empty() {
        return call(&words);
    }
    match find_port().and_then(|port| serve(&port).map_err(|e| format!("{}: {e}", port.display()))) {
        Ok(()) => eprintln!("agent: the host closed the line"),
        Err(why) => eprintln!("agent: {why}"),
    }
    ExitCode::FAILURE // init must not return; the panic that follows is wanted
}

/// `agent call <socket> <method> <params>`: one JSON-RPC call to a server in this guest; prints its result.
fn call(words: &[String]) -> ExitCode {
    let [verb, socket, method, params] = words else {
        eprintln!("usage: agent call <socket> <method> <params as JSON>");
        return ExitCode::FAILURE;
    };
    let answer = match (verb.as_str(), serde_json::from_str(params)) {
        ("call", Ok(params)) => call_json(Path::new(socket), method, params, Duration::from_secs(60)).map_err(|e| e.to_string()),
        (_, Err(why)) => Err(format!("params: {why}")),
        (other, _) => Err(format!("{other}? only call is known")),
    };
    match answer {
        Ok(result) => {
            println!("{result}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// devtmpfs names ports by number; which one is ours stands in sysfs.
fn find_port() -> Result<PathBuf, String> {
    let class = Path::new("/sys/class/virtio-ports");
    let mut deadline = Deadline::after(Duration::from_secs(20));
    while !deadline.passed() {
        for entry in std::fs::read_dir(class).into_iter().flatten().flatten() {
            let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(format!("no virtio-serial port named {PORT} under {}", class.display()))
}

fn serve(port: &Path) -> std::io::Result<()> {
    let line = OpenOptions::new().read(true).write(true).open(port)?;
    let answers = Arc::new(Mutex::new(line.try_clone()?));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    say(&answers, &Reply::Hello { kernel });
    std::fs::create_dir_all("/run/agent")?;
    for request in BufReader::new(line).lines() {
        let request = request?;
        match serde_json::from_str::<Request>(&request) {
            Ok(request) => {
                let answers = Arc::clone(&answers);
                std::thread::spawn(move || say(&answers, &Reply::Done(run(&request))));
            }
            Err(why) => eprintln!("agent: not a request: {why}"),
        }
    }
    Ok(())
}

fn say(answers: &Mutex<File>, reply: &Reply) {
    let mut text = serde_json::to_vec(reply).expect("replies are plain data");
    text.push(b'\n');
    let mut line = answers.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Err(why) = line.write_all(&text) {
        eprintln!("agent: cannot answer: {why}");
    }
}

fn run(request: &Request) -> Outcome {
    let failed = |why: String| Outcome { id: request.id, status: Some(127), out: String::new(), err: why };
    // Files, not pipes: a background process that keeps a pipe open would hold the answer back.
    let stem = PathBuf::from(format!("/run/agent/{}", request.id));
    let (out, err) = (stem.with_extension("out"), stem.with_extension("err"));
    let streams = File::create(&out).and_then(|o| Ok((o, File::create(&err)?)));
    let (out_file, err_file) = match streams {
        Ok(files) => files,
        Err(why) => return failed(format!("cannot keep the output: {why}")),
    };
    let child = Command::new("/bin/sh")
        .args(["-c", &request.script])
        .stdin(Stdio::null())
        .stdout(out_file)
        .stderr(err_file)
        .process_group(0)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(why) => return failed(format!("cannot start a shell: {why}")),
    };
    // a host that was suspended jumps the guest's clock; that is not the script's time
    let mut deadline = Deadline::after(Duration::from_millis(request.limit_ms));
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status.code().or(status.signal().map(|s| 128 + s)),
            Ok(None) if !deadline.passed() => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) => {
                // the whole group: the shell's children too
                // busybox has no "--"
                let _ = Command::new("/bin/kill").args(["-9", &format!("-{}", child.id())]).status();
                let _ = child.wait();
                break None;
            }
            Err(why) => return failed(format!("cannot wait for the shell: {why}")),
        }
    };
    let outcome = Outcome { id: request.id, status, out: tail(&out), err: tail(&err) };
    let _ = std::fs::remove_file(&out);
    let _ = std::fs::remove_file(&err);
    outcome
}

fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(OUTPUT_LIMIT as u64)))?;
        let mut bytes = Vec::new();
        file.take(OUTPUT_LIMIT as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_or_else(|why| format!("(output lost: {why})"), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}
