//! A timeline of transfers in the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open.
//!
//! Format: "Trace Event Format", complete events (`ph: "X"`), times in microseconds.

use serde_json::{Value, json};

use crate::Cause;

/// One transfer on the timeline.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TraceEvent {
    /// Why.
    pub cause: Cause,
    /// Bytes moved.
    pub bytes: usize,
    /// Begin, microseconds since the device was opened.
    pub start_us: f64,
    /// Duration in microseconds.
    pub duration_us: f64,
}

/// Events in the order in which they ended.
#[derive(Debug, Clone, Default)]
pub struct Trace(Vec<TraceEvent>);

impl Trace {
    /// Adds an event.
    pub fn push(&mut self, event: TraceEvent) {
        self.0.push(event);
    }

    /// The events.
    #[must_use]
    pub fn events(&self) -> &[TraceEvent] {
        &self.0
    }

    /// The whole timeline as a JSON document.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let names = [
            (1, "offload (device to host)"),
            (2, "onboard (host to device)"),
            (3, "spill (host to disk)"),
            (4, "unspill (disk to host)"),
        ];
        let mut events: Vec<Value> = names
            .iter()
            .map(|(tid, name)| {
                json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}})
            })
            .collect();
        events.extend(self.0.iter().map(|event| {
            let gbps =
                if event.duration_us > 0.0 { event.bytes as f64 / event.duration_us / 1e3 } else { 0.0 };
            json!({
                "ph": "X", "pid": 1, "tid": track(event.cause), "name": event.cause.name(),
                "ts": event.start_us, "dur": event.duration_us,
                "args": {"bytes": event.bytes, "GB/s": gbps},
            })
        }));
        json!({"traceEvents": events, "displayTimeUnit": "ms"})
    }
}

fn track(cause: Cause) -> u32 {
    match cause {
        Cause::Offload => 1,
        Cause::Prefetch | Cause::OnDemand => 2,
        Cause::Spill => 3,
        Cause::Unspill => 4,
    }
}
