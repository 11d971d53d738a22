//! What `status` and `plan` show, for people and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::change::Change;
use crate::drives::{self, Drive, DriveState};
use crate::kernel::Kernel;
use crate::pages::{self, HugeMount, PagePool};
use crate::plan::is_loaded;
use crate::{Outcome, Problem};

/// The machine as it is.
#[derive(Debug, Serialize)]
pub struct Status {
    pub pools: Vec<PagePool>,
    pub mounts: Vec<HugeMount>,
    pub drives: Vec<Drive>,
    pub iommu: bool,
    /// Loaded drivers that hand devices to user space.
    pub drivers: Vec<&'static str>,
    /// What `undo` would take back, oldest first.
    pub changes: Vec<Change>,
}

pub fn status(kernel: &dyn Kernel, changes: Vec<Change>) -> Outcome<Status> {
    Ok(Status {
        pools: pages::pools(kernel)?,
        mounts: pages::mounts(kernel)?,
        drives: drives::all(kernel)?,
        iommu: kernel.list("/sys/class/iommu").is_ok_and(|names| !names.is_empty()),
        drivers: drives::USER_SPACE_DRIVERS.into_iter().filter(|d| is_loaded(kernel, d)).collect(),
        changes,
    })
}

impl Status {
    pub fn text(&self) -> String {
        let mut out = String::from("hugepages  node  page   pages  free\n");
        for pool in &self.pools {
            let (page, node) = (pool.page_size.to_string(), pool.node);
            let _ = writeln!(out, "           {node:<5} {page:<6} {:<6} {}", pool.pages, pool.pages_free);
        }
        let mounts: Vec<String> = self.mounts.iter().map(|m| format!("{} ({})", m.path, m.page_size)).collect();
        let _ = writeln!(out, "mounted    {}", or_none(&mounts));
        let _ = writeln!(out, "iommu      {}", if self.iommu { "on" } else { "off" });
        let _ = writeln!(out, "drivers    {}", or_none(&self.drivers));
        let _ = writeln!(out, "drives     {}", if self.drives.is_empty() { "none (no NVMe controller on PCI)" } else { "" });
        for drive in &self.drives {
            let names: Vec<String> = drive.namespaces.iter().map(|n| format!("{} {}", n.device, n.size)).collect();
            let driver = drive.binding.driver.as_deref().unwrap_or("no driver");
            let model = drive.model.as_deref().unwrap_or("-");
            let node = drive.numa_node.map_or("-".into(), |n| n.to_string());
            let _ = write!(out, "  {}  {driver}  node {node}  {model}  [{}]  ", drive.pci, names.join(", "));
            let _ = match &drive.state {
                DriveState::Free => writeln!(out, "free to bind"),
                DriveState::UserSpace => writeln!(out, "in user space"),
                DriveState::Taken(reasons) => writeln!(out, "left alone: {}", reasons.join("; ")),
            };
        }
        let _ = writeln!(out, "changes    {}", if self.changes.is_empty() { "none of ours" } else { "(undo takes them back)" });
        for change in &self.changes {
            let _ = writeln!(out, "  {change}");
        }
        out
    }
}

fn or_none<T: AsRef<str>>(words: &[T]) -> String {
    if words.is_empty() { "none".into() } else { words.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(", ") }
}

/// What would be done, and what stands in the way.
#[derive(Debug, Default, Serialize)]
pub struct Plan {
    pub changes: Vec<Change>,
    pub obstacles: Vec<Obstacle>,
    /// Commands that make the changes.
    pub commands: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct Obstacle {
    pub what: String,
    pub next: String,
}

impl Plan {
    /// Adds the outcome of planning `command`.
    pub fn add(&mut self, command: String, planned: Outcome<Vec<Change>>) {
        match planned {
            Ok(changes) if changes.is_empty() => {}
            Ok(changes) => {
                self.changes.extend(changes);
                self.commands.push(command);
            }
            Err(Problem { what, next }) => self.obstacles.push(Obstacle { what, next }),
        }
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        if self.changes.is_empty() && self.obstacles.is_empty() {
            return "nothing to do: all is as wanted\n".into();
        }
        for change in &self.changes {
            let _ = writeln!(out, "would change  {change}");
        }
        for obstacle in &self.obstacles {
            let _ = writeln!(out, "in the way    {}\n        next  {}", obstacle.what, obstacle.next);
        }
        for command in &self.commands {
            let _ = writeln!(out, "run           {command}");
        }
        out
    }
}
