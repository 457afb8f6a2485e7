//! The sessions themselves: how they come into being, are saved, come back and end.

use crate::{
    Command, Error, Result,
    keys::Owner,
    ledger::{Ledger, Opened, Saved},
    live::Live,
    table::{Entry, Rest, State},
    worker::{Worker, now_s},
};

impl Worker<'_> {
    /// Adds a session.
    pub(crate) fn open(&mut self, owner: &Owner, name: Option<String>, exact: bool) -> Result<u64> {
        let key = self.table.new_key();
        self.executor.command(&Command::Open { key, exact })?;
        self.enter(key, owner, name)
    }

    /// Enters a session that the executor has.
    pub(crate) fn enter(&mut self, key: u64, owner: &Owner, name: Option<String>) -> Result<u64> {
        let created = now_s();
        if let (Some(ledger), Some(name)) = (&mut self.ledger, &name)
            && let Err(error) = ledger.opened(key, owner, name, created)
        {
            self.executor.command(&Command::Close { key })?;
            return Err(error);
        }
        self.table.insert(Entry {
            key,
            owner: owner.clone(),
            name,
            created,
            state: State::Idle,
            rest: None,
            armed: None,
            is_dirty: true,
            rolled_back: false,
        });
        Ok(key)
    }

    /// Ends a session that no client can name.
    pub(crate) fn close_nameless(&mut self, key: u64) {
        if self.table.get_mut(key).is_some_and(|entry| entry.name.is_none()) {
            self.table.remove(key);
            if let Err(error) = self.executor.command(&Command::Close { key }) {
                eprintln!("overspill: session {key} did not end: {error}");
            }
        }
    }

    /// Notes in the ledger that a session is not any more what was saved.
    pub(crate) fn changed(&mut self, key: u64) {
        let Some(entry) = self.table.get_mut(key) else { return };
        if !entry.is_dirty {
            entry.is_dirty = true;
            if let Some(Err(error)) = self.ledger.as_mut().map(|ledger| ledger.dirty(key)) {
                eprintln!("overspill: {error}");
            }
        }
    }

    /// Saves one session.
    pub(crate) fn save(&mut self, key: u64) -> Result<()> {
        let Some(ledger) = &mut self.ledger else {
            return Err(Error::Conflict { message: "the server has no --state-dir to save to".to_owned() });
        };
        let Some(entry) = self.table.get_mut(key) else { return Ok(()) };
        let (file, path) = ledger.path_for(key);
        let record = self.executor.command(&Command::Save { key, path: &path })?;
        let progress = entry.rest.as_ref().map(|rest| rest.progress.clone());
        ledger.saved(key, Saved { file, record, state: entry.state, progress })?;
        entry.is_dirty = false;
        Ok(())
    }

    /// Saves all sessions that have a name; how many could not be.
    pub fn save_all(&mut self) -> usize {
        let keys: Vec<u64> = self
            .table
            .iter()
            .filter(|entry| entry.name.is_some() && entry.is_dirty && entry.state != State::Lost)
            .map(|entry| entry.key)
            .collect();
        let mut lost = 0;
        for key in keys {
            if let Err(error) = self.save(key) {
                eprintln!("overspill: session {key} is not saved: {error}");
                lost += 1;
            }
        }
        lost
    }

    /// Takes up what a ledger has.
    pub fn load(&mut self, ledger: Ledger, found: Vec<Opened>) {
        for session in found {
            let key = session.key;
            let loaded = session.saved.as_ref().map(|saved| {
                let path = ledger.path_of(&saved.file);
                self.executor.command(&Command::Load { key, path: &path, record: &saved.record })
            });
            if let Some(Err(error)) = &loaded {
                eprintln!("overspill: session {:?} is not loaded: {error}", session.name);
            }
            let (state, rest) = match (session.saved, loaded) {
                (Some(saved), Some(Ok(_))) => {
                    let layer = if let State::Paused { layer } = saved.state { layer } else { None };
                    (saved.state, saved.progress.map(|progress| Rest { progress, layer }))
                }
                _ => (State::Lost, None),
            };
            self.table.insert(Entry {
                key,
                owner: session.owner,
                name: Some(session.name),
                created: session.created,
                state,
                rest,
                armed: None,
                is_dirty: false,
                rolled_back: session.is_dirty && state != State::Lost,
            });
        }
        self.ledger = Some(ledger);
    }

    /// Where everything is.
    pub(crate) fn report(&mut self) -> Result<Live> {
        let report = self.executor.command(&Command::Report {})?;
        Ok(Live::new(&report, &self.table, &self.info, self.metrics.tokens()))
    }
}
