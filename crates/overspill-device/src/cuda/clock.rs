//! Events of the driver and the clock they tell.
//!
//! The driver gives the time between two events as a 32-bit float of milliseconds: after an hour
//! that is a quarter of a millisecond coarse. So every event is timed against a base event not much
//! older than itself, and the bases are a chain back to the first, whose host time is known.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags};

use super::driver::{Context, check};
use crate::Result;

/// Above 8 s a 32-bit float of milliseconds is coarser than a microsecond.
const BASE_AGE: Duration = Duration::from_secs(8);
/// Between two looks at an event: short against a copy that is worth making.
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_micros(200);

/// An event of the driver, destroyed when dropped.
pub struct RawEvent {
    context: Arc<Context>,
    pub raw: CUevent,
}

// SAFETY: the driver locks events; a handle may be used on any thread.
unsafe impl Send for RawEvent {}
// SAFETY: as above.
unsafe impl Sync for RawEvent {}

impl RawEvent {
    /// An event at the end of what `stream` has been given so far.
    pub fn record(context: &Arc<Context>, stream: CUstream) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // Not the kind that wakes a sleeping thread: while a stream is busy the driver takes 125 us to record one of
        // those, and with 32 of them under way it holds the caller until one has passed (H200, driver 580).
        let flags = CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: the context is current; destroyed once, in `drop`.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        let event = Self { context: Arc::clone(context), raw };
        // SAFETY: event and stream live, and are of this context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(raw, stream) })?;
        Ok(event)
    }

    pub fn is_done(&self) -> Result<bool> {
        let _entered = self.context.enter()?;
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check("cuEventQuery", other).map(|()| true),
        }
    }

    /// Blocks until the event has passed. Looks and sleeps, rather than spin in the driver for as long as a copy takes.
    pub fn synchronize(&self) -> Result<()> {
        let mut pause = SHORTEST_PAUSE;
        while !self.is_done()? {
            std::thread::sleep(pause);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    fn us_since(&self, earlier: &Self) -> Result<f64> {
        let _entered = self.context.enter()?;
        let mut ms = 0.0;
        // SAFETY: both events live, are recorded, and were made with timing.
        let asked = unsafe { sys::cuEventElapsedTime(&raw mut ms, earlier.raw, self.raw) };
        check("cuEventElapsedTime", asked)?;
        Ok(f64::from(ms) * 1e3)
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: made in `record`; the driver keeps what it still needs of it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// An event whose time since the opening is known, or follows from the base before it.
pub struct Base {
    event: RawEvent,
    made: Instant,
    at_us: OnceLock<f64>,
    previous: Mutex<Option<Arc<Base>>>,
}

impl Base {
    fn at_us(&self) -> Result<f64> {
        if let Some(&at_us) = self.at_us.get() {
            return Ok(at_us);
        }
        let previous = self.previous.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Absent only if another thread has just worked out the time.
        let Some(previous) = previous else { return Ok(self.at_us.get().copied().unwrap_or(0.0)) };
        self.event.synchronize()?;
        let at_us = previous.at_us()? + self.event.us_since(&previous.event)?;
        let _ = self.at_us.set(at_us);
        *self.previous.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(at_us)
    }

    /// Device time of a passed event, in microseconds since the device was opened.
    pub fn time_us(&self, event: &RawEvent) -> Result<f64> {
        let at_us = self.at_us()?; // known only once this base has passed
        Ok(at_us + event.us_since(&self.event)?)
    }
}

/// See the module.
pub struct Clock {
    context: Arc<Context>,
    /// Carries nothing but base events, so a base never waits behind work.
    stream: CUstream,
    opened: Instant,
    current: Mutex<Arc<Base>>,
}

// SAFETY: the stream handle may be used on any thread; the driver locks it.
unsafe impl Send for Clock {}
// SAFETY: as above.
unsafe impl Sync for Clock {}

impl Clock {
    pub fn start(context: &Arc<Context>) -> Result<Self> {
        let stream = new_stream(context)?;
        let event = RawEvent::record(context, stream)?;
        event.synchronize()?;
        let opened = Instant::now();
        let base = Base { event, made: opened, at_us: OnceLock::from(0.0), previous: Mutex::new(None) };
        Ok(Self { context: Arc::clone(context), stream, opened, current: Mutex::new(Arc::new(base)) })
    }

    /// Host time on this clock.
    pub fn now_us(&self) -> f64 {
        self.opened.elapsed().as_secs_f64() * 1e6
    }

    /// The base for events recorded now.
    pub fn base(&self) -> Result<Arc<Base>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.made.elapsed() > BASE_AGE {
            let event = RawEvent::record(&self.context, self.stream)?;
            let previous = Mutex::new(Some(Arc::clone(&current)));
            *current = Arc::new(Base { event, made: Instant::now(), at_us: OnceLock::new(), previous });
        }
        Ok(Arc::clone(&current))
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        destroy_stream(&self.context, self.stream);
    }
}

/// A stream that does not wait for the default stream (rule 2).
pub fn new_stream(context: &Context) -> Result<CUstream> {
    let _entered = context.enter()?;
    let mut raw = std::ptr::null_mut();
    let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: the context is current; its owner destroys the stream once.
    check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut raw, flags) })?;
    Ok(raw)
}

pub fn destroy_stream(context: &Context, stream: CUstream) {
    if let Ok(_entered) = context.enter() {
        // SAFETY: made by `new_stream` and not used after; the driver finishes what it holds first.
        let _ = unsafe { sys::cuStreamDestroy_v2(stream) };
    }
}
