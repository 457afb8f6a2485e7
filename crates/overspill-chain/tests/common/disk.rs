//! A folder that forgets at a crash.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use overspill_chain::files::{Files, Folder, Make};
use overspill_chain::{Error, Result};

/// A file's content; whether it would survive a crash.
#[derive(Debug, Clone, Default)]
struct Inode {
    flushed: Option<Vec<u8>>,
}

/// A change of names that no flush of its folder has made durable.
#[derive(Debug, Clone)]
enum Pending {
    Create { name: String, inode: usize },
    Rename { from: String, to: String, inode: usize },
    Remove { name: String },
}

impl Pending {
    fn dir(&self) -> &str {
        let (Pending::Create { name, .. } | Pending::Rename { to: name, .. } | Pending::Remove { name }) =
            self;
        name.rsplit_once('/').map_or("", |(dir, _)| dir)
    }
}

/// What a crash would leave.
#[derive(Debug, Default)]
pub struct Disk {
    inodes: Vec<Inode>,
    /// Names as the running program sees them, and as the disk has them.
    names: BTreeMap<String, usize>,
    durable: BTreeMap<String, usize>,
    pending: Vec<Pending>,
    operations: u64,
    crash_at: Option<u64>,
}

/// A real folder whose every change is also noted in a [`Disk`]. The operation `crash_at` and all later ones fail, as
/// if the program had been killed; the failing write may leave half of its file.
pub struct Crashing {
    real: Folder,
    disk: Arc<Mutex<Disk>>,
}

impl Crashing {
    pub fn new(root: &Path, crash_at: Option<u64>) -> (Self, Arc<Mutex<Disk>>) {
        let disk = Arc::new(Mutex::new(Disk { crash_at, ..Disk::default() }));
        (Crashing { real: Folder::new(root), disk: Arc::clone(&disk) }, disk)
    }

    /// Counts an operation; an error once the crash has come.
    fn step(&self) -> Result<()> {
        let mut disk = self.disk.lock().expect("unpoisoned");
        disk.operations += 1;
        if disk.crash_at.is_some_and(|at| disk.operations > at) {
            let source = std::io::Error::other("killed");
            return Err(Error::Io { path: self.real.path(""), action: "go on", source });
        }
        Ok(())
    }
}

impl Files for Crashing {
    fn path(&self, name: &str) -> PathBuf {
        self.real.path(name)
    }

    fn list(&self, dir: &str) -> Result<Vec<String>> {
        self.real.list(dir)
    }

    fn create_dir(&self, dir: &str) -> Result<()> {
        self.real.create_dir(dir)
    }

    fn create(&self, name: &str, make: Make<'_>) -> Result<()> {
        let killed = self.step();
        if killed.is_ok() {
            self.real.create(name, make)?;
        }
        let mut disk = self.disk.lock().expect("unpoisoned");
        let inode = disk.inodes.len();
        disk.inodes.push(Inode::default());
        disk.names.insert(name.to_owned(), inode);
        disk.pending.push(Pending::Create { name: name.to_owned(), inode });
        killed
    }

    fn flush(&self, name: &str) -> Result<()> {
        self.step()?;
        let bytes = fs::read(self.path(name)).expect("readable");
        let mut disk = self.disk.lock().expect("unpoisoned");
        let inode = disk.names[name];
        disk.inodes[inode].flushed = Some(bytes);
        Ok(())
    }

    fn flush_dir(&self, dir: &str) -> Result<()> {
        self.step()?;
        let mut disk = self.disk.lock().expect("unpoisoned");
        let (own, others) =
            std::mem::take(&mut disk.pending).into_iter().partition(|change| change.dir() == dir);
        disk.pending = others;
        let own: Vec<Pending> = own;
        own.iter().for_each(|change| apply(&mut disk.durable, change));
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.step()?;
        self.real.rename(from, to)?;
        let mut disk = self.disk.lock().expect("unpoisoned");
        let inode = disk.names.remove(from).expect("there");
        disk.names.insert(to.to_owned(), inode);
        disk.pending.push(Pending::Rename { from: from.to_owned(), to: to.to_owned(), inode });
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.step()?;
        self.real.remove(name)?;
        let mut disk = self.disk.lock().expect("unpoisoned");
        disk.names.remove(name);
        disk.pending.push(Pending::Remove { name: name.to_owned() });
        Ok(())
    }
}

fn apply(names: &mut BTreeMap<String, usize>, change: &Pending) {
    match change {
        Pending::Create { name, inode } => {
            names.insert(name.clone(), *inode);
        }
        Pending::Rename { from, to, inode } => {
            names.remove(from);
            names.insert(to.clone(), *inode);
        }
        Pending::Remove { name } => {
            names.remove(name);
        }
    }
}

impl Disk {
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Writes into `root` what is left after a crash: of the changes of names that were not flushed any part, in any
    /// order; of content that was not flushed nothing, zeros, or a beginning of it.
    pub fn leave(&self, running: &Path, root: &Path, random: &mut fastrand::Rng) {
        let mut names = self.durable.clone();
        let mut pending = self.pending.clone();
        if random.bool() {
            random.shuffle(&mut pending);
        }
        pending.iter().filter(|_| random.bool()).for_each(|change| apply(&mut names, change));
        for dir in ["objects", "steps", "cache"] {
            fs::create_dir_all(root.join(dir)).expect("created");
        }
        for (name, inode) in names {
            let bytes = self.inodes[inode].flushed.clone().unwrap_or_else(|| {
                let now = self.names.iter().find(|&(_, &other)| other == inode);
                let mut bytes =
                    now.and_then(|(name, _)| fs::read(running.join(name)).ok()).unwrap_or_default();
                match random.u8(0..3) {
                    0 => bytes.truncate(random.usize(0..=bytes.len())),
                    1 => bytes.fill(0),
                    _ => {}
                }
                bytes
            });
            fs::write(root.join(name), bytes).expect("written");
        }
    }
}
