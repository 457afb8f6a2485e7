//! Which sessions there are and which of them are saved, in a file that outlives the process.
//!
//! `ledger.jsonl` has a line for everything that happened: a session was opened, saved, changed since,
//! closed. Each is written with one call before the server goes on, so that a killed server leaves
//! all lines but perhaps the last, which then belongs to something that nobody was told of. A power
//! failure may lose more: lines are not synced. At a start the file is read and written anew.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result, keys::Owner, progress::Progress, table::State};

/// A session in the ledger.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Opened {
    /// Its number.
    pub key: u64,
    /// Whose it is.
    pub owner: Owner,
    /// What its owner calls it.
    pub name: String,
    /// Seconds since 1970.
    pub created: u64,
    /// As it was last saved.
    pub saved: Option<Saved>,
    /// Whether it has changed since.
    pub is_dirty: bool,
}

/// A session as it was saved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    /// The file, in the folder of the ledger.
    pub file: String,
    /// What the executor needs beside it.
    pub record: Value,
    /// What it was doing.
    pub state: State,
    /// What was left to generate.
    pub progress: Option<Progress>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Opened(Opened),
    Saved { key: u64, saved: Saved },
    Dirty { key: u64 },
    Closed { key: u64 },
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    folder: PathBuf,
    file: File,
    files: BTreeMap<u64, String>,
    /// Held as long as the server uses the folder.
    _lock: File,
}

impl Ledger {
    /// Opens the ledger in `folder`, made if there is none, and the sessions in it.
    pub fn open(folder: &Path) -> Result<(Self, Vec<Opened>)> {
        let refused = |path: &Path, reason: &dyn std::fmt::Display| Error::State {
            path: path.to_owned(),
            reason: reason.to_string(),
        };
        std::fs::create_dir_all(folder).map_err(|error| refused(folder, &error))?;
        let lock_path = folder.join("lock");
        let lock = File::create(&lock_path).map_err(|error| refused(&lock_path, &error))?;
        lock.try_lock().map_err(|_| refused(folder, &"another server uses this folder"))?;
        let path = folder.join("ledger.jsonl");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(refused(&path, &error)),
        };
        let sessions =
            replay(&text).map_err(|line| refused(&path, &format!("line {line} is not of a ledger")))?;
        let scratch = folder.join("ledger.jsonl.new");
        let mut whole = Vec::new();
        for session in sessions.values() {
            whole.extend(line(&Line::Opened(session.clone())));
        }
        std::fs::write(&scratch, whole).map_err(|error| refused(&scratch, &error))?;
        std::fs::rename(&scratch, &path).map_err(|error| refused(&path, &error))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| refused(&path, &error))?;
        let files = sessions.iter().filter_map(|(&key, one)| Some((key, one.saved.as_ref()?.file.clone())));
        let ledger = Self { folder: folder.to_owned(), file, files: files.collect(), _lock: lock };
        Ok((ledger, sessions.into_values().collect()))
    }

    /// Where a session is saved next.
    pub fn path_for(&self, key: u64) -> (String, PathBuf) {
        let other = self.files.get(&key).is_some_and(|file| file.ends_with("a.session"));
        let file = format!("{key}-{}.session", if other { "b" } else { "a" });
        let path = self.folder.join(&file);
        (file, path)
    }

    /// Where a file of the ledger is.
    pub fn path_of(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// A session was opened.
    pub fn opened(&mut self, key: u64, owner: &Owner, name: &str, created: u64) -> Result<()> {
        let (owner, name) = (owner.clone(), name.to_owned());
        self.append(&Line::Opened(Opened { key, owner, name, created, saved: None, is_dirty: true }))
    }

    /// A session was saved, and its file is whole.
    pub fn saved(&mut self, key: u64, saved: Saved) -> Result<()> {
        let file = saved.file.clone();
        self.append(&Line::Saved { key, saved })?;
        if let Some(old) = self.files.insert(key, file) {
            // Its space is all that is lost if it stays.
            let _ = std::fs::remove_file(self.folder.join(old));
        }
        Ok(())
    }

    /// A session goes on after it was saved.
    pub fn dirty(&mut self, key: u64) -> Result<()> {
        self.append(&Line::Dirty { key })
    }

    /// A session has ended.
    pub fn closed(&mut self, key: u64) -> Result<()> {
        self.append(&Line::Closed { key })?;
        if let Some(old) = self.files.remove(&key) {
            let _ = std::fs::remove_file(self.folder.join(old));
        }
        Ok(())
    }

    fn append(&mut self, entry: &Line) -> Result<()> {
        let path = || self.folder.join("ledger.jsonl");
        self.file
            .write_all(&line(entry))
            .map_err(|error| Error::State { path: path(), reason: error.to_string() })
    }
}

fn line(entry: &Line) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(entry).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// The sessions after all lines; the number of a line that is none. A last line that was cut off is passed over.
fn replay(text: &str) -> std::result::Result<BTreeMap<u64, Opened>, usize> {
    let mut sessions = BTreeMap::new();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for (number, line) in whole.lines().enumerate() {
        match serde_json::from_str(line).map_err(|_| number + 1)? {
            Line::Opened(session) => drop(sessions.insert(session.key, session)),
            Line::Closed { key } => drop(sessions.remove(&key)),
            Line::Saved { key, saved } => {
                let session = sessions.get_mut(&key).ok_or(number + 1)?;
                (session.saved, session.is_dirty) = (Some(saved), false);
            }
            Line::Dirty { key } => sessions.get_mut(&key).ok_or(number + 1)?.is_dirty = true,
        }
    }
    Ok(sessions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(file: String) -> Saved {
        Saved { file, record: Value::from(7), state: State::Paused { layer: Some(3) }, progress: None }
    }

    #[test]
    fn what_was_written_is_there_again_cut_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let owner = Owner::new("o");
        {
            let (mut ledger, found) = Ledger::open(folder.path()).unwrap();
            assert!(found.is_empty());
            assert!(matches!(Ledger::open(folder.path()), Err(Error::State { .. })), "two servers");
            for key in 1..=3 {
                ledger.opened(key, &owner, &format!("s{key}"), 5).unwrap();
            }
            for key in [1, 2] {
                let (file, path) = ledger.path_for(key);
                std::fs::write(path, b"").unwrap();
                ledger.saved(key, saved(file)).unwrap();
            }
            ledger.dirty(2).unwrap();
            let (file, path) = ledger.path_for(1);
            std::fs::write(path, b"").unwrap();
            ledger.saved(1, saved(file)).unwrap();
            ledger.closed(3).unwrap();
        }
        assert!(!folder.path().join("1-a.session").exists() && folder.path().join("1-b.session").exists());
        let text = std::fs::read_to_string(folder.path().join("ledger.jsonl")).unwrap();
        for cut in 0..=text.len() {
            let upto = replay(&text[..cut]).unwrap();
            assert!(upto.len() <= 3);
        }
        let (_, found) = Ledger::open(folder.path()).unwrap();
        let facts: Vec<_> = found.iter().map(|s| (s.key, s.saved.is_some(), s.is_dirty)).collect();
        assert_eq!(facts, [(1, true, false), (2, true, true)]);
        assert_eq!(found[0].saved.as_ref().unwrap().state, State::Paused { layer: Some(3) });
        assert_eq!(replay("{\"dirty\":{\"key\":9}}\n").unwrap_err(), 1);
    }
}
