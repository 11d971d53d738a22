//! What can be typed.

use std::net::SocketAddr;

use clap::{Args as ClapArgs, Parser, Subcommand};
use penstock_api::http::SnapshotName;
use penstock_api::rpc::{Door, ScrubAction};
use penstock_api::{ByteSize, DriveSpec, Nqn, VolumeName};

use crate::client::Api;
use crate::output::Form;

/// Says that a door is at its node's own address: control puts that in.
pub const NVMF_ANYWHERE: &str = "0.0.0.0:0";

/// Volumes for virtual machines, on one node or replicated over several.
#[derive(Debug, Parser)]
#[command(
    name = "penstock",
    version,
    after_help = "\
Examples:
  penstock pool add 'file:/var/lib/penstock/d0.img?size=10GiB'
  penstock volume create db-0 4GiB
  penstock volume create db-1 --size 4GiB --replicas 3
  penstock volume export db-0 --nvmf
  penstock volume ls -o json
  penstock replica ls
  penstock top

Sizes: 4096, 4k, 512MiB, 10GiB, 1.5TiB (k, m, g, t are binary; kB, MB, GB, TB decimal).

Exit codes: 0 done; 1 refused or failed, with the reason; 2 wrong usage; 3 penstock-control does not answer;
4 taken in and durable, but not done within --timeout."
)]
pub struct Args {
    /// Where penstock-control listens: unix:PATH or http://127.0.0.1:PORT
    #[arg(long, global = true, env = "PENSTOCK_API", default_value = "unix:/run/penstock/control.sock", value_name = "ADDRESS")]
    pub api: Api,

    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Form::Table, value_name = "FORM")]
    pub output: Form,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Drives of the nodes
    #[command(subcommand)]
    Pool(Pool),
    /// Volumes and their exports
    #[command(subcommand)]
    Volume(Volume),
    /// Replicas of the volumes that have several
    #[command(subcommand)]
    Replica(Replica),
    /// Volumes as they were at some moment; kept until they are removed, and read by no host yet
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// The nodes themselves
    #[command(subcommand)]
    Node(Node),
    /// Unique ids
    #[command(subcommand)]
    Id(IdCommand),
    /// Live rates and latencies of all volumes
    #[command(after_help = "Examples:\n  penstock top\n  penstock top --once -o json")]
    Top(Top),
    /// Wait until everything written is in its permanent place
    #[command(after_help = "Examples:\n  penstock drain\n  penstock drain file:/var/lib/penstock/d0.img")]
    Drain {
        /// Drive's id, or its spec; all drives if absent
        drive: Option<String>,
    },
    /// Read a drive through and verify all checksums
    #[command(after_help = "Examples:\n  penstock scrub file:/var/lib/penstock/d0.img start\n  penstock scrub nvme:0000:00:04.0 status")]
    Scrub {
        /// Drive's id, or its spec
        drive: String,
        #[arg(value_enum, default_value_t = ScrubWord::Status)]
        action: ScrubWord,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ScrubWord {
    Start,
    Stop,
    Status,
}

impl From<ScrubWord> for ScrubAction {
    fn from(word: ScrubWord) -> Self {
        match word {
            ScrubWord::Start => Self::Start,
            ScrubWord::Stop => Self::Stop,
            ScrubWord::Status => Self::Status,
        }
    }
}

/// How long to wait for the node.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub struct Wait {
    /// Seconds to wait for the node to have done it; 0 returns once it is taken in
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
}

#[derive(Debug, Subcommand)]
pub enum Pool {
    /// Add a drive; it must be blank
    #[command(after_help = "\
Drives:
  file:/path/to.img?size=10GiB   a file, made if absent       block:/dev/sdx   a block device
  nvme:0000:00:04.0[/1]          NVMe over PCIe, by SPDK       vfio-user:/dir   NVMe over vfio-user
  malloc:name?size=1GiB          memory, gone with the process bdev:name        an SPDK bdev
Options of all: power_safe=true (taken though no flush reaches it), stores=N (default: one per core). Quote the ?.

Examples:
  penstock pool add 'file:/var/lib/penstock/d0.img?size=10GiB'
  penstock pool add nvme:0000:00:04.0 --node n2
  penstock pool add 'malloc:m0?size=1GiB' --volatile")]
    Add {
        spec: DriveSpec,
        /// Node that has the drive, by name or id; the only one if absent
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        /// Stores to cut it into; one per core if absent
        #[arg(long, value_name = "N")]
        stores: Option<u16>,
        /// Oplog of each store, such as 1GiB; by the drive's size if absent
        #[arg(long, value_name = "SIZE")]
        oplog: Option<ByteSize>,
        /// Accept that everything on it is gone when penstockd stops
        #[arg(long)]
        volatile: bool,
        /// Destroy what it holds
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// List drives
    #[command(after_help = "Examples:\n  penstock pool ls\n  penstock pool ls -o json")]
    Ls,
    /// Detach a drive; nothing on it is erased
    #[command(after_help = "Examples:\n  penstock pool rm file:/var/lib/penstock/d0.img")]
    Rm {
        /// Drive's id, or its spec
        drive: String,
        /// Though volumes live on it: they leave with it, and `pool import` brings them back
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Take up drives and volumes from what the drives say of themselves
    #[command(after_help = "\
Examples:
  penstock pool import                                   what the nodes have open
  penstock pool import file:/var/lib/penstock/d0.img nvme:0000:00:04.0")]
    Import {
        specs: Vec<DriveSpec>,
        /// Node that has the drives named, by name or id; the only one if absent
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        /// Close the doors that the nodes serve now, instead of taking them up
        #[arg(long)]
        no_exports: bool,
    },
    /// Let a fenced drive take writes again
    #[command(after_help = "Examples:\n  penstock pool clear-fence file:/var/lib/penstock/d0.img")]
    ClearFence {
        /// Drive's id, or its spec
        drive: String,
    },
}

/// Replicas with data, and those that keep the log alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    pub with_data: u8,
    pub log_only: u8,
}

fn snapshot_name(text: &str) -> Result<SnapshotName, String> {
    match text.split_once('@') {
        Some((volume, snapshot)) if !volume.is_empty() && !snapshot.is_empty() => {
            Ok(SnapshotName { volume: volume.to_owned(), snapshot: snapshot.to_owned() })
        }
        _ => Err(format!("\"{text}\" is not VOLUME@SNAPSHOT, such as db-0@monday")),
    }
}

fn replicas(text: &str) -> Result<Replicas, String> {
    let (count, log_only) = text.strip_suffix("+log").map_or((text, 0), |count| (count, 1));
    let with_data = count.parse().map_err(|_| format!("\"{text}\" is neither a number such as 3 nor one such as 2+log"))?;
    Ok(Replicas { with_data, log_only })
}

#[derive(Debug, Subcommand)]
pub enum Volume {
    /// Create a volume
    #[command(after_help = "\
Examples:
  penstock volume create db-0 4GiB
  penstock volume create db-1 --size 4GiB --replicas 3
  penstock volume create db-2 --size 4GiB --replicas 2+log
  penstock volume create old 100GB --block-size 512
  penstock volume create db-test --from db-1@monday
  penstock volume create db-test --from db-1@monday --size 8GiB")]
    Create {
        name: VolumeName,
        #[arg(required_unless_present_any = ["sized", "from"], value_name = "SIZE")]
        size: Option<ByteSize>,
        /// As the size without a flag
        #[arg(long = "size", id = "sized", value_name = "SIZE", conflicts_with = "size")]
        sized: Option<ByteSize>,
        /// Copies, each on another node: 1, 3 or 5; or 2+log, two and one that keeps the log alone, which takes hardly any space. Writes are durable on a
        /// majority before they are acknowledged. One if absent; a clone has as many as its origin
        #[arg(long, value_name = "N", value_parser = replicas)]
        replicas: Option<Replicas>,
        /// Logical block that hosts see: 512 or 4096. 4096 if absent; a clone has its origin's
        #[arg(long, value_parser = ["512", "4096"])]
        block_size: Option<String>,
        /// Make a clone: a volume that begins as this snapshot, at once and without a copy, on the drives where its volume is. The snapshot stays as long
        /// as the clone does
        #[arg(long, value_name = "VOLUME@SNAPSHOT", value_parser = snapshot_name)]
        from: Option<SnapshotName>,
        /// Drive's id, or its spec; repeat for each replica, last for the one that keeps the log. Those with the most room if absent
        #[arg(long)]
        drive: Vec<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// List volumes
    #[command(after_help = "Examples:\n  penstock volume ls\n  penstock volume ls -o json")]
    Ls,
    /// Show one volume
    #[command(after_help = "Examples:\n  penstock volume show db-0")]
    Show { volume: String },
    /// Change a volume's size, while it is in use too
    #[command(after_help = "Examples:\n  penstock volume resize db-0 8GiB\n  penstock volume resize db-0 1GiB --allow-shrink")]
    Resize {
        volume: String,
        size: ByteSize,
        /// Destroy what lies beyond the new end
        #[arg(long)]
        allow_shrink: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Remove a volume and its data
    #[command(after_help = "Examples:\n  penstock volume rm db-0")]
    Rm {
        volume: String,
        /// Though it is exported or in use
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Let the replica of another node lead
    #[command(after_help = "Examples:\n  penstock volume transfer db-1 --to n2")]
    Transfer {
        volume: String,
        /// Node that is to lead, by name or id
        #[arg(long, value_name = "NODE")]
        to: String,
    },
    /// Open doors to a volume, on every node that has a replica of it
    #[command(after_help = "\
Examples:
  penstock volume export db-0 --nvmf
  penstock volume export db-1 --nvmf=10.0.0.2:4421 --node n2
  penstock volume export db-0 --nvmf=127.0.0.1:4421 --vhost
  penstock volume export db-0 --vfio-user=db0")]
    Export {
        volume: String,
        #[command(flatten)]
        doors: Doors,
        /// On this node alone, by name or id
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Close doors to a volume; all of them if none is named
    #[command(after_help = "Examples:\n  penstock volume unexport db-0\n  penstock volume unexport db-0 --nvmf --force")]
    Unexport {
        volume: String,
        #[command(flatten)]
        doors: Doors,
        /// On this node alone, by name or id
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        /// Though hosts are connected
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
}

#[derive(Clone, Debug, Default, ClapArgs)]
pub struct Doors {
    /// NVMe over TCP [default: the address that penstock-control has of each node, 127.0.0.1:4420 where there is one]
    #[arg(long, value_name = "ADDR:PORT", num_args = 0..=1, require_equals = true, default_missing_value = NVMF_ANYWHERE)]
    pub nvmf: Option<SocketAddr>,
    /// NQN of the subsystem; chosen by the node if absent
    #[arg(long, requires = "nvmf", value_name = "NQN", value_parser = |text: &str| text.parse::<Nqn>())]
    pub nqn: Option<Nqn>,
    /// vhost-user-blk [default name: the volume's]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub vhost: Option<String>,
    /// NVMe over vfio-user [default name: the volume's]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub vfio_user: Option<String>,
}

impl Doors {
    pub fn is_empty(&self) -> bool {
        self.nvmf.is_none() && self.vhost.is_none() && self.vfio_user.is_none()
    }

    /// The doors as said, in the order of the flags.
    pub fn doors(&self) -> Result<Vec<Door>, String> {
        let name = |text: &String| {
            if text.is_empty() { Ok(None) } else { text.parse::<VolumeName>().map(Some).map_err(|error| error.to_string()) }
        };
        let mut doors = Vec::new();
        if let Some(at) = self.nvmf {
            doors.push(Door::Nvmf { address: at.ip(), port: at.port(), nqn: self.nqn.clone() });
        }
        if let Some(text) = &self.vhost {
            doors.push(Door::Vhost { name: name(text)? });
        }
        if let Some(text) = &self.vfio_user {
            doors.push(Door::VfioUser { name: name(text)? });
        }
        Ok(doors)
    }
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// List the nodes
    #[command(after_help = "Examples:\n  penstock node ls\n  penstock node ls -o json")]
    Ls,
    /// Show a node, and whether desired and observed agree there
    #[command(after_help = "Examples:\n  penstock node show\n  penstock node show n2\n  penstock node show -o json")]
    Show {
        /// Name or id; the only one if absent
        node: Option<String>,
    },
    /// Remove a node that is away; with --force one that is lost for good: its drives are forgotten and its replicas replaced on other nodes
    #[command(after_help = "\
Examples:
  penstock node rm n3
  penstock node rm n3 --force

Refused while a volume has its only replica there, nobody leads a volume of it, or no other node can take a new replica. Take it out of
penstock-control's --node flags before control is started the next time.")]
    Rm {
        /// Name or id
        node: String,
        /// Though it has drives and replicas
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
}

#[derive(Debug, Subcommand)]
pub enum Replica {
    /// List the replicas of all volumes, or of one: where they are, how they stand, how far behind
    #[command(after_help = "Examples:\n  penstock replica ls\n  penstock replica ls db-1\n  penstock replica ls -o json")]
    Ls {
        /// Name or id
        volume: Option<String>,
    },
    /// Move a replica to another node, under load too; the old one counts until the new one has everything
    #[command(after_help = "Examples:\n  penstock replica move db-1 n1 n4\n  penstock replica move db-1 n1 n4 --timeout 0")]
    Move {
        volume: String,
        /// Node whose replica goes, by name or id
        from: String,
        /// Node that gets a new one
        to: String,
        /// Drive of that node: id, or its spec; the one with the most room if absent
        #[arg(long)]
        drive: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Make a new replica for one that is lost, or of no use any more
    #[command(after_help = "\
Examples:
  penstock replica replace db-1 n2
  penstock replica replace db-1 n2 --on n4
  penstock replica replace db-1 n2 --drive file:/var/lib/penstock/d1.img

The old replica's data on its node, if any, are deleted.")]
    Replace {
        volume: String,
        /// Node of the replica that is given up, by name or id
        node: String,
        /// Node of the new one; the same if it can, else the one with the most room, if absent
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        /// Drive for it: id, or its spec
        #[arg(long)]
        drive: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Take back a move or a replacement that is under way
    #[command(after_help = "Examples:\n  penstock replica give-up db-1")]
    GiveUp {
        volume: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Go on with one replica alone, where most of the others are lost for good; says what would be lost, and does it with --force
    #[command(after_help = "\
Examples:
  penstock replica recover db-1
  penstock replica recover db-1 --on n1 --force
  penstock -o json replica recover db-1 --on n1 --force

Refused while most replicas are there. The receipt says what is kept and what may be lost; the replicas that are cut off are then
replaced one by one.")]
    Recover {
        volume: String,
        /// Node whose replica goes on, by name or id; needed where several are left
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        /// Do it
        #[arg(long)]
        force: bool,
        /// Though what that replica has is itself in question
        #[arg(long)]
        regardless: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Take a snapshot of a volume, while it is in use too: every write that was answered before is in it
    #[command(after_help = "Examples:\n  penstock snapshot create db-0 monday")]
    Create {
        volume: String,
        name: VolumeName,
        #[command(flatten)]
        wait: Wait,
    },
    /// List the snapshots of all volumes, or of one, oldest first; ALLOCATED is what was written between the one before and it
    #[command(after_help = "Examples:\n  penstock snapshot ls\n  penstock snapshot ls db-0\n  penstock snapshot ls -o json")]
    Ls {
        /// Name or id
        volume: Option<String>,
    },
    /// Remove a snapshot; its space comes back in the background
    #[command(after_help = "Examples:\n  penstock snapshot rm db-0 monday")]
    Rm {
        volume: String,
        /// Name or id
        name: String,
        #[command(flatten)]
        wait: Wait,
    },
}

#[derive(Debug, Subcommand)]
pub enum IdCommand {
    /// Issue ids that nobody ever gets again
    #[command(after_help = "Examples:\n  penstock id new\n  penstock id new --count 10")]
    New {
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        count: u32,
    },
}

#[derive(Debug, ClapArgs)]
pub struct Top {
    /// One measurement over one interval, then end
    #[arg(long)]
    pub once: bool,
    /// Seconds between measurements
    #[arg(long, default_value_t = 1.0, value_parser = interval)]
    pub interval: f64,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("use seconds from 0.1 to 3600".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use proptest::prelude::*;

    #[test]
    fn args_are_consistent_and_every_leaf_has_examples() {
        Args::command().debug_assert();
        fn leaves(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            let children: Vec<_> = command.get_subcommands().collect();
            if children.is_empty() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Examples:"), "{path} has no examples");
            }
            children.into_iter().for_each(|child| leaves(child, &path));
        }
        leaves(&Args::command(), "");
    }

    #[test]
    fn export_flags_become_doors() {
        let parse = |flags: &[&str]| {
            let args = ["penstock", "volume", "export", "v"].iter().chain(flags).copied();
            match Args::try_parse_from(args).map(|args| args.command) {
                Ok(Command::Volume(Volume::Export { doors, .. })) => doors.doors(),
                Ok(other) => panic!("{other:?}"),
                Err(error) => Err(error.to_string()),
            }
        };
        let text = |flags: &[&str]| parse(flags).unwrap().iter().map(Door::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(text(&["--nvmf"]), "nvmf=0.0.0.0:0", "wherever its node listens");
        assert_eq!(text(&["--nvmf=[::1]:1", "--vhost", "--vfio-user=x"]), "nvmf=[::1]:1 vhost vfio-user=x");
        assert!(parse(&["--vhost=../x"]).unwrap_err().contains("may not be in a name"));
        assert!(parse(&["--nqn", "nqn.2026-11.io:x"]).is_err(), "an NQN alone opens nothing");
    }

    proptest! {
        #[test]
        fn args_random_never_panic(words in proptest::collection::vec("(pool|volume|add|create|export|--nvmf=|-o|json|10GiB|\\PC{0,8})", 0..6)) {
            let _ = Args::try_parse_from(["penstock".to_owned()].into_iter().chain(words));
        }
    }
}
