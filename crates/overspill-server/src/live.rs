//! Where everything is at a moment: what the page shows.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
};

use axum::body::Bytes;
use serde_json::{Value, json};

use crate::{ModelInfo, keys::Owner, table::Table};

/// See the module. One is shared by all who watch; what each owner may see is written down once.
#[derive(Debug)]
pub struct Live {
    sessions: Vec<(Owner, Value)>,
    pool: Value,
    model: Value,
    tokens: u64,
    rendered: Mutex<HashMap<Owner, Bytes>>,
}

impl Live {
    /// From what the executor reports.
    pub fn new(report: &Value, table: &Table, info: &ModelInfo, tokens: u64) -> Self {
        let shown = |key: u64| &report["sessions"][key.to_string()];
        Self {
            sessions: table.iter().map(|one| (one.owner.clone(), one.to_json(shown(one.key)))).collect(),
            pool: report["pool"].clone(),
            model: json!({
                "id": info.id, "layers": info.layers, "device": info.device, "slabs": info.slabs,
                "session_tokens": info.session_tokens,
            }),
            tokens,
            rendered: Mutex::default(),
        }
    }

    /// An event of it for `owner`, to whom others' sessions are memory without a name.
    pub fn event(&self, owner: &Owner) -> Bytes {
        let mut rendered = self.rendered.lock().unwrap_or_else(PoisonError::into_inner);
        let render = || {
            let seen = |(whose, session): &(Owner, Value)| {
                let mut session = session.clone();
                if whose != owner {
                    let places = ["resident", "device_bytes", "host_bytes", "disk_bytes"];
                    let kept = places.map(|name| (name.to_owned(), session[name].take()));
                    session = json!(HashMap::from(kept));
                }
                session
            };
            let sessions: Vec<_> = self.sessions.iter().map(seen).collect();
            let all = json!({
                "sessions": sessions, "pool": self.pool, "model": self.model, "tokens": self.tokens,
            });
            Bytes::from(format!("data: {all}\n\n"))
        };
        rendered.entry(owner.clone()).or_insert_with(render).clone()
    }

    /// Sessions by state.
    pub fn states(&self) -> BTreeMap<&str, usize> {
        let mut states = BTreeMap::new();
        for (_, session) in &self.sessions {
            *states.entry(session["state"].as_str().unwrap_or("")).or_default() += 1;
        }
        states
    }

    /// What the pool reports.
    pub fn pool(&self) -> &Value {
        &self.pool
    }
}
