//! The command `penstock-hugepages`: words in, changes and reports out. The work is in the library.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use penstock_hugepages::change::Change;
use penstock_hugepages::journal::{self, Journal};
use penstock_hugepages::kernel::Machine;
use penstock_hugepages::pci::PciAddress;
use penstock_hugepages::plan::{self, DriverChoice};
use penstock_hugepages::report::{self, Plan};
use penstock_hugepages::size::Bytes;
use penstock_hugepages::{Outcome, drives};

const EXAMPLES: &str = "\
Examples:
  penstock-hugepages status                          what is there: pages, mounts, drives, our own changes
  penstock-hugepages plan --memory 2GiB --drive all  what would be done and what is in the way; changes nothing
  penstock-hugepages reserve 2GiB                    2 GiB of free hugepages on every NUMA node
  penstock-hugepages reserve 1GiB --node 0 --page-size 1GiB
  penstock-hugepages mount                           hugetlbfs at /dev/hugepages
  penstock-hugepages bind 0000:00:04.0               hand an NVMe drive to user space
  penstock-hugepages unbind 0000:00:04.0             hand it back to the kernel
  penstock-hugepages undo                            take back everything, also after a crash midway

Nothing of this survives a reboot. A drive that is mounted, in use, or holds a partition table or a file system is
left alone unless --force names it.";

#[derive(Parser)]
#[command(name = "penstock-hugepages", version, about = "Plan, reserve and mount hugepages; bind NVMe drives to user space; undo", after_help = EXAMPLES)]
struct Cli {
    /// Where changes are journaled
    #[arg(long, global = true, default_value = "/run/penstock-hugepages/journal", value_name = "PATH")]
    journal: PathBuf,
    /// A tree of files that looks like a machine (tests)
    #[arg(long, global = true, hide = true, default_value = "/", value_name = "DIR")]
    root: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show hugepages, mounts, drives and the changes that undo would take back
    Status {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show what would be changed and what is in the way; changes nothing
    Plan {
        /// Free hugepages wanted on each node
        #[arg(long, value_name = "SIZE")]
        memory: Option<Bytes>,
        #[command(flatten)]
        pages: PageArgs,
        /// Where to mount hugetlbfs
        #[arg(long, value_name = "PATH")]
        mount: Option<String>,
        /// Drives wanted in user space: PCI addresses, or "all" for every free one
        #[arg(long = "drive", value_name = "ADDRESS")]
        drives: Vec<String>,
        #[arg(long, value_enum, default_value_t)]
        driver: Driver,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Reserve hugepages, so that each node has SIZE of them free
    Reserve {
        /// For instance 512MiB or 4GiB, per node
        size: Bytes,
        #[command(flatten)]
        pages: PageArgs,
        #[command(flatten)]
        how: How,
    },
    /// Mount hugetlbfs
    Mount {
        #[arg(default_value = "/dev/hugepages")]
        path: String,
        /// 2MiB or 1GiB; the smallest if left out
        #[arg(long, value_name = "SIZE")]
        page_size: Option<Bytes>,
        #[command(flatten)]
        how: How,
    },
    /// Hand NVMe drives to user space
    Bind {
        #[arg(required = true, value_name = "ADDRESS")]
        drives: Vec<PciAddress>,
        #[arg(long, value_enum, default_value_t)]
        driver: Driver,
        /// Take this drive even though it is in use or holds data
        #[arg(long, value_name = "ADDRESS")]
        force: Vec<PciAddress>,
        #[command(flatten)]
        how: How,
    },
    /// Hand NVMe drives back to the kernel's nvme driver
    Unbind {
        #[arg(required = true, value_name = "ADDRESS")]
        drives: Vec<PciAddress>,
        #[command(flatten)]
        how: How,
    },
    /// Take back every change of ours, newest first
    Undo {
        #[command(flatten)]
        how: How,
    },
}

#[derive(Args)]
struct PageArgs {
    /// 2MiB or 1GiB; the smallest if left out
    #[arg(long, value_name = "SIZE")]
    page_size: Option<Bytes>,
    /// A NUMA node; all of them if left out
    #[arg(long = "node", value_name = "NODE")]
    nodes: Vec<u32>,
}

#[derive(Args)]
struct How {
    /// Print what would be changed, and change nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Driver {
    /// vfio-pci where there is an IOMMU, else uio_pci_generic
    #[default]
    Auto,
    #[value(name = "vfio-pci")]
    VfioPci,
    #[value(name = "uio_pci_generic")]
    UioPciGeneric,
}

impl From<Driver> for DriverChoice {
    fn from(driver: Driver) -> Self {
        match driver {
            Driver::Auto => Self::Auto,
            Driver::VfioPci => Self::VfioPci,
            Driver::UioPciGeneric => Self::UioPciGeneric,
        }
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("penstock-hugepages: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Outcome<()> {
    let mut machine = Machine::at(&cli.root);
    let journal = machine.path(&cli.journal.to_string_lossy());
    match cli.command {
        Command::Status { output } => {
            let status = report::status(&machine, Journal::peek(&journal, &machine)?)?;
            show(output, &status, || status.text());
            Ok(())
        }
        Command::Plan { memory, pages, mount, drives, driver, output } => {
            let plan = make_plan(&machine, memory, &pages, mount, &drives, driver)?;
            show(output, &plan, || plan.text());
            Ok(())
        }
        Command::Reserve { size, pages, how } => {
            let changes = plan::reserve(&machine, size, pages.page_size, &pages.nodes)?;
            change(&mut machine, &journal, &changes, how)
        }
        Command::Mount { path, page_size, how } => {
            let changes = plan::mount(&machine, &path, page_size)?;
            change(&mut machine, &journal, &changes, how)
        }
        Command::Bind { drives, driver, force, how } => {
            let changes = plan::bind(&machine, &drives, driver.into(), &force)?;
            change(&mut machine, &journal, &changes, how)
        }
        Command::Unbind { drives, how } => {
            let changes = plan::unbind(&machine, &drives)?;
            change(&mut machine, &journal, &changes, how)
        }
        Command::Undo { how } => undo(&mut machine, &journal, how),
    }
}

fn show<T: serde::Serialize>(output: Output, report: &T, text: impl Fn() -> String) {
    match output {
        Output::Text => print!("{}", text()),
        Output::Json => println!("{}", serde_json::to_string_pretty(report).expect("reports are plain data")),
    }
}

fn change(machine: &mut Machine, journal: &std::path::Path, changes: &[Change], how: How) -> Outcome<()> {
    if changes.is_empty() {
        println!("nothing to do: all is as wanted");
        return Ok(());
    }
    if how.dry_run {
        changes.iter().for_each(|change| println!("would change: {change}"));
        return Ok(());
    }
    let mut journal = Journal::open(journal, machine)?;
    journal::make_all(machine, &mut journal, changes, |line| println!("{line}"))
}

fn undo(machine: &mut Machine, journal: &std::path::Path, how: How) -> Outcome<()> {
    let standing = Journal::peek(journal, machine)?;
    if standing.is_empty() {
        println!("nothing to undo");
        return Ok(());
    }
    if how.dry_run {
        standing.iter().rev().for_each(|change| println!("would undo: {change}"));
        return Ok(());
    }
    let mut journal = Journal::open(journal, machine)?;
    let standing = journal.standing();
    journal::unmake_all(machine, &mut journal, standing, |line| println!("{line}")).map(|_| ())
}

fn make_plan(
    machine: &Machine,
    memory: Option<Bytes>,
    pages: &PageArgs,
    mount: Option<String>,
    wanted: &[String],
    driver: Driver,
) -> Outcome<Plan> {
    let mut plan = Plan::default();
    let page_size = pages.page_size.map(|size| format!(" --page-size {size}")).unwrap_or_default();
    if let Some(memory) = memory {
        let nodes: String = pages.nodes.iter().map(|node| format!(" --node {node}")).collect();
        let command = format!("penstock-hugepages reserve {memory}{page_size}{nodes}");
        plan.add(command, plan::reserve(machine, memory, pages.page_size, &pages.nodes));
    }
    if let Some(path) = mount {
        plan.add(format!("penstock-hugepages mount {path}{page_size}"), plan::mount(machine, &path, pages.page_size));
    }
    let mut addresses: Vec<PciAddress> = Vec::new();
    for text in wanted {
        match text.as_str() {
            "all" => addresses.extend(drives::all(machine)?.iter().map(|d| d.pci)),
            text => addresses.push(text.parse().map_err(|what: String| {
                penstock_hugepages::Problem::new(what, "name a drive as `penstock-hugepages status` shows it, or all")
            })?),
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    let driver_word = match driver {
        Driver::Auto => "",
        Driver::VfioPci => " --driver vfio-pci",
        Driver::UioPciGeneric => " --driver uio_pci_generic",
    };
    for pci in addresses {
        plan.add(format!("penstock-hugepages bind {pci}{driver_word}"), plan::bind(machine, &[pci], driver.into(), &[]));
    }
    Ok(plan)
}
