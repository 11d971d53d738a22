//! Starts penstock-control: state, reconciler, API; leaves cleanly on SIGTERM.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use penstock_control::config::{Config, LogForm};
use penstock_control::control::{Control, NodeHandle};
use penstock_control::node::NodeClient;
use penstock_control::reconciler::Reconciler;
use penstock_control::{http, listen};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Requests under way at SIGTERM have so long to end.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

fn start_log(form: LogForm) {
    let filter = EnvFilter::try_from_env("PENSTOCK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match form {
        LogForm::Text => log.with_ansi(false).init(),
        LogForm::Json => log.json().init(),
    }
}

async fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let flags = config.nodes()?;
    let names = flags.iter().map(|node| format!("{}={}", node.named.name, node.socket.display())).collect::<Vec<_>>().join(" ");
    let nodes: Vec<NodeHandle> = flags.into_iter().map(|node| NodeHandle::new(node.named, NodeClient::new(&node.socket))).collect();
    let count = nodes.len();
    // The store first: its lock keeps a second control from taking this one's socket.
    let control = Arc::new(Control::open(&config.state_dir, config.restored, nodes, config.wait())?);
    let bound = listen::bind(&config.listen).await?;
    tracing::info!(listen = bound.address(), nodes = names, "penstock-control {} is up", env!("CARGO_PKG_VERSION"));

    // One for each node: what happens at one holds up no other.
    let mut reconcilers = tokio::task::JoinSet::new();
    for at in 0..count {
        reconcilers.spawn(Reconciler::new(Arc::clone(&control), at, config.period()).run());
    }
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let shutdown = async move {
        let mut stopped = stopped;
        // An error means that the sender is gone, which is a reason to stop as well.
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let mut server = tokio::spawn(bound.serve(http::router(Arc::clone(&control)), shutdown));

    let reason = tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        reason = control.fatal() => return Err(format!("the store failed: {reason}").into()),
        Some(ended) = reconcilers.join_next() => return Err(format!("a reconciler ended: {:?}", ended.err()).into()),
        ended = &mut server => return Err(format!("the API ended: {ended:?}").into()),
    };
    tracing::info!("leaving on {reason}");
    stop.send_replace(true);
    reconcilers.abort_all();
    if tokio::time::timeout(LEAVE_LIMIT, &mut server).await.is_err() {
        tracing::warn!("requests were still under way after {} s", LEAVE_LIMIT.as_secs());
        server.abort();
        // Aborted tasks drop what they hold, the socket's file among it.
        let _ = server.await;
    }
    Ok(())
}

fn main() -> ExitCode {
    let config = Config::parse();
    start_log(config.log);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(config));
            runtime.shutdown_timeout(Duration::from_secs(1));
            result
        }
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
