//! What clients do to sessions between steps.

use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::{
    Command, Error, Result,
    keys::Owner,
    table::{Rest, State},
    worker::Worker,
};

/// A request about sessions of one owner.
pub struct Control {
    /// Whose.
    pub owner: Owner,
    /// What.
    pub act: Act,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<Answer>>,
}

/// What comes back.
pub enum Answer {
    /// An object.
    Json(Value),
    /// A safetensors file.
    File(Vec<u8>),
}

/// What is asked.
pub enum Act {
    /// All sessions.
    List,
    /// A new one.
    Create {
        /// Its name; none: one is made up.
        name: Option<String>,
        /// Whether its steps are never batched with others'.
        exact: bool,
    },
    /// Something about one.
    One(String, Deed),
}

/// What is asked about one session.
pub enum Deed {
    /// What it is.
    Get,
    /// To end it.
    Delete,
    /// To stop after a layer of its next forward, or before it.
    Pause {
        /// The layer.
        layer: Option<usize>,
    },
    /// A second one from here.
    Fork {
        /// Its name; none: one is made up.
        name: Option<String>,
    },
    /// It waits for something.
    IoWait {
        /// Milliseconds from now.
        eta_ms: f64,
    },
    /// To steer a layer.
    Steer(Steer),
    /// To write it to disk.
    Save,
    /// Its hidden state.
    Hidden,
    /// Another hidden state.
    SetHidden(Vec<u8>),
}

/// See [`Command::Steer`].
pub struct Steer {
    /// The layer.
    pub layer: usize,
    /// What it is called.
    pub name: String,
    /// The direction, or
    pub vector: Option<Vec<f32>>,
    /// the text to which it leads
    pub toward: Option<String>,
    /// from this one.
    pub away: Option<String>,
    /// What it is multiplied with.
    pub strength: f64,
}

impl Worker<'_> {
    /// Does it and answers.
    pub fn control(&mut self, control: Control) {
        let Control { owner, act, reply } = control;
        let done = match act {
            Act::List => self.list(&owner).map(Answer::Json),
            Act::Create { name, exact } => self.create(&owner, name, exact).map(Answer::Json),
            Act::One(name, deed) => self.act_on(&owner, &name, deed),
        };
        // The client may be gone; what was asked is done all the same.
        let _ = reply.send(done);
    }

    fn list(&mut self, owner: &Owner) -> Result<Value> {
        let report = self.executor.command(&Command::Report {})?;
        let own = self.table.iter().filter(|entry| entry.owner == *owner && entry.name.is_some());
        let data: Vec<_> =
            own.map(|entry| entry.to_json(&report["sessions"][entry.key.to_string()])).collect();
        Ok(json!({"object": "list", "data": data}))
    }

    fn create(&mut self, owner: &Owner, name: Option<String>, exact: bool) -> Result<Value> {
        let name = self.new_name(owner, name)?;
        self.open(owner, Some(name.clone()), exact)?;
        self.describe(owner, &name)
    }

    /// A name that is free, and room for one more session.
    fn new_name(&mut self, owner: &Owner, name: Option<String>) -> Result<String> {
        let (own, all) = self.table.named(owner);
        let refused = |what, limit| Err(Error::TooMany { what, limit, retry_s: 10 });
        if own >= self.limits.sessions_per_key {
            return refused("sessions of this key", self.limits.sessions_per_key);
        }
        if all >= self.limits.sessions {
            return refused("sessions", self.limits.sessions);
        }
        let name = name.unwrap_or_else(|| format!("sess-{:016x}", fastrand::u64(..)));
        match self.table.find(owner, &name) {
            Ok(entry) => Err(entry.conflict("exists already")),
            Err(_) => Ok(name),
        }
    }

    fn act_on(&mut self, owner: &Owner, name: &str, deed: Deed) -> Result<Answer> {
        let entry = self.table.find(owner, name)?;
        let key = entry.key;
        if entry.state == State::Lost && !matches!(deed, Deed::Get | Deed::Delete) {
            return Err(Error::Lost { id: name.to_owned() });
        }
        match deed {
            Deed::Get => {}
            Deed::Delete => return self.delete(key, name),
            Deed::Pause { layer } => {
                self.layer_exists(layer.unwrap_or(0))?;
                let entry = self.table.find(owner, name)?;
                if entry.rest.is_some() {
                    return Err(entry.conflict("is paused already"));
                }
                entry.armed = Some(layer);
            }
            Deed::Fork { name: child } => return self.fork(owner, key, name, child),
            Deed::IoWait { eta_ms } => {
                entry.at_rest()?;
                self.executor.command(&Command::IoWait { key, eta_ms })?;
                let entry = self.table.find(owner, name)?;
                if entry.state == State::Idle {
                    entry.state = State::Waiting;
                }
            }
            Deed::Steer(steer) => self.steer(key, &steer)?,
            Deed::Save => {
                entry.at_rest()?;
                self.save(key)?;
            }
            Deed::Hidden => {
                self.stands(owner, name)?;
                return self.executor.hidden(key).map(Answer::File);
            }
            Deed::SetHidden(file) => {
                self.stands(owner, name)?;
                self.executor.set_hidden(key, &file)?;
                self.changed(key);
            }
        }
        self.describe(owner, name).map(Answer::Json)
    }

    fn describe(&mut self, owner: &Owner, name: &str) -> Result<Value> {
        let report = self.executor.command(&Command::Report {})?;
        let entry = self.table.find(owner, name)?;
        Ok(entry.to_json(&report["sessions"][entry.key.to_string()]))
    }

    fn delete(&mut self, key: u64, name: &str) -> Result<Answer> {
        self.cancel(key);
        let is_lost = self.table.get_mut(key).is_some_and(|entry| entry.state == State::Lost);
        if !is_lost {
            self.executor.command(&Command::Close { key })?;
        }
        self.table.remove(key);
        if let Some(ledger) = &mut self.ledger {
            ledger.closed(key)?;
        }
        Ok(Answer::Json(json!({"id": name, "object": "session.deleted", "deleted": true})))
    }

    fn fork(&mut self, owner: &Owner, parent: u64, name: &str, child: Option<String>) -> Result<Answer> {
        self.table.find(owner, name)?.at_rest()?;
        let child_name = self.new_name(owner, child)?;
        let child = self.table.new_key();
        self.executor.command(&Command::Fork { key: parent, child })?;
        self.enter(child, owner, Some(child_name.clone()))?;
        let entry = self.table.find(owner, name)?;
        let rest =
            entry.rest.as_ref().map(|rest| Rest { progress: rest.progress.clone(), layer: rest.layer });
        let entry = self.table.find(owner, &child_name)?;
        entry.rest = rest;
        entry.rest();
        self.describe(owner, &child_name).map(Answer::Json)
    }

    fn steer(&mut self, key: u64, steer: &Steer) -> Result<()> {
        self.layer_exists(steer.layer)?;
        if let Some(vector) = &steer.vector
            && vector.len() != self.info.hidden_size
        {
            let message = format!("vector has to have {} numbers", self.info.hidden_size);
            return Err(Error::invalid("vector", message));
        }
        self.executor.command(&Command::Steer {
            key,
            layer: steer.layer,
            name: &steer.name,
            vector: steer.vector.as_deref(),
            toward: steer.toward.as_deref(),
            away: steer.away.as_deref(),
            strength: steer.strength,
        })?;
        self.changed(key);
        Ok(())
    }

    fn layer_exists(&self, layer: usize) -> Result<()> {
        let layers = self.info.layers;
        if layer < layers {
            return Ok(());
        }
        Err(Error::invalid("layer", format!("layer has to be 0 to {}", layers - 1)))
    }

    /// Refuses unless the session stands after a layer.
    fn stands(&mut self, owner: &Owner, name: &str) -> Result<()> {
        let entry = self.table.find(owner, name)?;
        match entry.state {
            State::Paused { layer: Some(_) } => Ok(()),
            _ => Err(entry.conflict("does not stand after a layer")),
        }
    }
}
