//! Counters for Prometheus.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::Value;

use crate::live::Live;

/// Upper bounds of the histogram of steps, in seconds.
const BOUNDS_S: [f64; 10] = [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];

/// See the module. Everything is counted since the start.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(String, u16), u64>>,
    tokens: AtomicU64,
    prompt_tokens: AtomicU64,
    steps: [AtomicU64; BOUNDS_S.len() + 1],
    step_us: AtomicU64,
    sequences: AtomicU64,
    waiting: AtomicU64,
    running: AtomicU64,
    /// Open connections.
    pub connections: AtomicU64,
}

impl Metrics {
    /// A request was answered.
    pub fn request(&self, route: &str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((route.to_owned(), status)).or_default() += 1;
    }

    /// A prompt of so many new tokens was taken.
    pub fn prompt(&self, tokens: u64) {
        self.prompt_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// A token was generated.
    pub fn token(&self) {
        self.tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Tokens that were generated.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }

    /// A step of so many sequences took so long.
    pub fn step(&self, time: Duration, sequences: usize) {
        let at = BOUNDS_S.iter().position(|bound| time.as_secs_f64() <= *bound).unwrap_or(BOUNDS_S.len());
        self.steps[at].fetch_add(1, Ordering::Relaxed);
        self.step_us.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
        self.sequences.fetch_add(sequences as u64, Ordering::Relaxed);
    }

    /// So many requests wait and run.
    pub fn set_queue(&self, waiting: usize, running: usize) {
        self.waiting.store(waiting as u64, Ordering::Relaxed);
        self.running.store(running as u64, Ordering::Relaxed);
    }

    /// As Prometheus reads it; of `live`, only sums.
    pub fn to_text(&self, live: Option<&Live>) -> String {
        let mut text = String::new();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        };
        head(&mut text, "overspill_requests_total", "counter", "Requests answered, by route and status.");
        for ((route, status), count) in self.requests.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ =
                writeln!(text, "overspill_requests_total{{route=\"{route}\",status=\"{status}\"}} {count}");
        }
        let mut single = |name: &str, kind: &str, help: &str, value: u64| {
            head(&mut text, name, kind, help);
            let _ = writeln!(text, "{name} {value}");
        };
        single("overspill_tokens_total", "counter", "Tokens generated.", load(&self.tokens));
        single("overspill_prompt_tokens_total", "counter", "Prompt tokens run.", load(&self.prompt_tokens));
        single(
            "overspill_step_sequences_total",
            "counter",
            "Sequences over all steps.",
            load(&self.sequences),
        );
        single("overspill_requests_waiting", "gauge", "Requests that wait for a turn.", load(&self.waiting));
        single("overspill_requests_running", "gauge", "Requests that have a turn.", load(&self.running));
        single("overspill_connections", "gauge", "Open connections.", load(&self.connections));
        head(&mut text, "overspill_step_seconds", "histogram", "Time of a step.");
        let mut sum = 0;
        for (count, bound) in self
            .steps
            .iter()
            .zip(BOUNDS_S.map(|bound| bound.to_string()).iter().map(String::as_str).chain(["+Inf"]))
        {
            sum += load(count);
            let _ = writeln!(text, "overspill_step_seconds_bucket{{le=\"{bound}\"}} {sum}");
        }
        let _ = writeln!(text, "overspill_step_seconds_sum {}", load(&self.step_us) as f64 / 1e6);
        let _ = writeln!(text, "overspill_step_seconds_count {sum}");
        if let Some(live) = live {
            head(&mut text, "overspill_sessions", "gauge", "Open sessions, by state.");
            for (state, count) in live.states() {
                let _ = writeln!(text, "overspill_sessions{{state=\"{state}\"}} {count}");
            }
            pool(&mut text, live.pool());
        }
        text
    }
}

/// Every number that the pool reports, by the path of its name.
fn pool(text: &mut String, value: &Value) {
    fn walk(text: &mut String, name: &str, value: &Value) {
        match value {
            Value::Object(map) => {
                map.iter().for_each(|(key, value)| walk(text, &format!("{name}_{key}"), value));
            }
            Value::Number(number) => {
                let _ = write!(
                    text,
                    "# HELP {name} As the pool of sessions reports it.\n# TYPE {name} gauge\n{name} {number}\n"
                );
            }
            _ => {}
        }
    }
    walk(text, "overspill_pool", value);
}
