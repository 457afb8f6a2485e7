//! The sessions that clients know by name, and the ones without a name that answer a single request.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result, keys::Owner, progress::Progress};

/// What a session is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Nothing.
    Idle,
    /// A request of it waits for its turn.
    Queued,
    /// It generates.
    Running,
    /// It stands after a layer, or between two tokens.
    Paused {
        /// The layer; none: between tokens.
        layer: Option<usize>,
    },
    /// It waits for something outside.
    Waiting,
    /// It was not saved when the server ended.
    Lost,
}

/// A generation that was paused.
#[derive(Debug, Clone)]
pub struct Rest {
    /// What is left of it.
    pub progress: Progress,
    /// The layer after which it stands; none: between tokens.
    pub layer: Option<usize>,
}

/// One session.
#[derive(Debug)]
pub struct Entry {
    /// Its number.
    pub key: u64,
    /// Whose it is.
    pub owner: Owner,
    /// What its owner calls it; none: it ends with its request.
    pub name: Option<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// What it is doing.
    pub state: State,
    /// What is left to generate, while it is paused.
    pub rest: Option<Rest>,
    /// A pause that was asked for: after a layer of the next forward, or before it.
    pub armed: Option<Option<usize>>,
    /// Whether it has changed since it was saved.
    pub is_dirty: bool,
    /// Whether tokens were lost: it is as it was saved, and had gone on since.
    pub rolled_back: bool,
}

impl Entry {
    /// Refuses what cannot be done while a request of the session runs or waits.
    pub fn at_rest(&self) -> Result<()> {
        match self.state {
            State::Queued | State::Running => Err(self.conflict("has a request that is not over")),
            State::Lost => Err(Error::Lost { id: self.name.clone().unwrap_or_default() }),
            State::Idle | State::Paused { .. } | State::Waiting => Ok(()),
        }
    }

    /// No request of it runs or waits any more.
    pub fn rest(&mut self) {
        self.state = self.rest.as_ref().map_or(State::Idle, |rest| State::Paused { layer: rest.layer });
    }

    /// Why something cannot be done.
    pub fn conflict(&self, why: &str) -> Error {
        Error::Conflict { message: format!("session {:?} {why}", self.name.as_deref().unwrap_or("")) }
    }

    /// As its owner sees it; `place` is what the executor reports of it.
    pub fn to_json(&self, place: &Value) -> Value {
        let mut value = json!({
            "id": self.name,
            "object": "session",
            "created": self.created,
            "saved": !self.is_dirty,
            "rolled_back": self.rolled_back,
            "pause_at": self.armed.flatten(),
            "layer": null,
            "tokens": 0,
        });
        let state = serde_json::to_value(self.state).unwrap_or_default();
        for part in [&state, place] {
            for (name, found) in part.as_object().into_iter().flatten() {
                value[name] = found.clone();
            }
        }
        value
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Table {
    entries: BTreeMap<u64, Entry>,
    names: HashMap<(Owner, String), u64>,
    last_key: u64,
}

impl Table {
    /// A number that no session has had.
    pub fn new_key(&mut self) -> u64 {
        self.last_key += 1;
        self.last_key
    }

    /// Adds a session.
    pub fn insert(&mut self, entry: Entry) {
        self.last_key = self.last_key.max(entry.key);
        if let Some(name) = &entry.name {
            self.names.insert((entry.owner.clone(), name.clone()), entry.key);
        }
        self.entries.insert(entry.key, entry);
    }

    /// Takes a session out.
    pub fn remove(&mut self, key: u64) -> Option<Entry> {
        let entry = self.entries.remove(&key)?;
        if let Some(name) = &entry.name {
            self.names.remove(&(entry.owner.clone(), name.clone()));
        }
        Some(entry)
    }

    /// The session that `owner` calls `name`. Another owner's is as good as none.
    pub fn find(&mut self, owner: &Owner, name: &str) -> Result<&mut Entry> {
        let missing = || Error::NoSession { id: name.to_owned() };
        let key = self.names.get(&(owner.clone(), name.to_owned())).ok_or_else(missing)?;
        self.entries.get_mut(key).ok_or_else(missing)
    }

    /// The session of this number.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&key)
    }

    /// All of them, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// Those with a name: of one owner, and in all.
    pub fn named(&self, owner: &Owner) -> (usize, usize) {
        let own = self.names.keys().filter(|(found, _)| found == owner).count();
        (own, self.names.len())
    }
}
