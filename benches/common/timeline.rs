//! What happened when in one move.
//!
//! Role: the series behind the plot of a move: bytes on the wire, writes of the program at either end, what the source told while it copied. Neighbours: bench `migration` records,
//! `mover` adds what the source knows, the bench `report` draws. Invariants: times are of the system's clock until the end, and then milliseconds since the move
//! was asked for; steps are counted from the pause, so that none holds a part of it.

use super::{
    Result,
    measure::loopback_bytes,
    mover::Left,
    writer::{Wrote, now_ns},
};
use pageferry::MoveEvent;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};
use tokio::sync::broadcast::{Receiver, error::RecvError};

const STEP: Duration = Duration::from_millis(10);
const STEP_NS: i64 = STEP.as_nanos() as i64;
/// How much is kept of the time before a move and after it.
const MARGIN_MS: f64 = 200.0;

/// The file of time lines beside a bench's JSON file.
pub fn file_beside(json: &Path) -> PathBuf {
    let stem = json.file_stem().unwrap_or_default().to_string_lossy();
    json.with_file_name(format!("{stem}{FILE_END}"))
}

/// How the names of such files end.
pub const FILE_END: &str = "-timeline.json";

/// Counts what the loopback device carries, step by step.
pub struct Wire {
    quit: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<(u64, u64)>>>,
}

impl Wire {
    pub fn watch() -> Wire {
        let quit = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let quit = quit.clone();
            move || {
                let mut seen = Vec::new();
                while !quit.load(Relaxed) {
                    seen.push((now_ns(), loopback_bytes()?));
                    std::thread::sleep(STEP);
                }
                Ok(seen)
            }
        });
        Wire { quit, thread }
    }

    /// When it looked, and how many bytes there had been.
    pub fn seen(self) -> Result<Vec<(u64, u64)>> {
        self.quit.store(true, Relaxed);
        self.thread.join().map_err(|_| "the watch on the wire panicked")?
    }
}

/// What a source tells, with the time when it was told.
pub struct Told(Arc<Mutex<Vec<Value>>>);

impl Told {
    /// Listens until the source is gone.
    pub fn by(mut events: Receiver<MoveEvent>) -> Told {
        let told = Arc::new(Mutex::new(Vec::new()));
        std::thread::spawn({
            let told = told.clone();
            move || {
                loop {
                    match events.blocking_recv() {
                        Ok(event) => told.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend(copying(&event)),
                        Err(RecvError::Lagged(_)) => {}
                        Err(RecvError::Closed) => return,
                    }
                }
            }
        });
        Told(told)
    }

    pub fn copying(&self) -> Value {
        Value::Array(self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone())
    }
}

fn copying(event: &MoveEvent) -> Option<Value> {
    let MoveEvent::Copying { round, owed_bytes, dirty_bytes_s, bandwidth_bytes_s, predicted_downtime } = event else { return None };
    let mb = |bytes: &u64| *bytes as f64 / 1e6;
    Some(json!({
        "at_ns": now_ns(),
        "round": round,
        "owed_mb": mb(owed_bytes),
        "dirty_mb_s": mb(dirty_bytes_s),
        "bandwidth_mb_s": mb(bandwidth_bytes_s),
        "predicted_downtime_ms": predicted_downtime.map(|predicted| predicted.as_secs_f64() * 1e3),
    }))
}

/// How many operations were done in each whole step before `pause_ns` or behind it: `[end of the step in ns, operations]`.
pub fn writes(done_ns: &[u64], pause_ns: u64) -> Value {
    let step_of = |at: &u64| (*at as i64 - pause_ns as i64 - 1).div_euclid(STEP_NS);
    let (Some(first), Some(last)) = (done_ns.first().map(step_of), done_ns.last().map(step_of)) else { return json!([]) };
    // The first operation behind a pause may wait for long: nothing was done then.
    let first = first.min(0);
    let mut counts = vec![0u64; (last - first + 1) as usize];
    done_ns.iter().for_each(|at| counts[(step_of(at) - first) as usize] += 1);
    // Only a part of these was seen.
    let whole = |step: i64| (step != first || first == 0) && (step != last || last == -1);
    let ended_ns = |step: i64| pause_ns as i64 + (step + 1) * STEP_NS;
    (first..).zip(counts).filter(|(step, _)| whole(*step)).map(|(step, count)| json!([ended_ns(step), count])).collect()
}

/// One move: `asked_ns` when it was asked for, `complete_ns` when every page was there.
pub fn of_move(asked_ns: u64, complete_ns: u64, left: &Left, there: &Wrote, wire: &[(u64, u64)]) -> Value {
    let ms = |at_ns: u64| (at_ns as f64 - asked_ns as f64) / 1e6;
    let is_near = |at_ms: &f64| *at_ms >= -MARGIN_MS && *at_ms <= ms(complete_ns) + MARGIN_MS;
    let rates = |writes: &Value| -> Value {
        let rate = |step: &Value| Some((ms(step.get(0)?.as_u64()?), step.get(1)?.as_f64()? / STEP.as_secs_f64()));
        let rates = writes.as_array().into_iter().flatten().filter_map(rate);
        rates.filter(|(at_ms, _)| is_near(at_ms)).map(|(at_ms, rate)| json!([short(at_ms), rate])).collect()
    };
    let wire = wire.windows(2).map(|seen| {
        let [(from_ns, from), (to_ns, to)] = [seen[0], seen[1]];
        (ms(to_ns), (to - from) as f64 * 1e3 / (to_ns - from_ns).max(1) as f64)
    });
    let mut copying = left.copying.clone();
    for told in copying.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        let at_ns = told.remove("at_ns").and_then(|at| at.as_u64()).unwrap_or(asked_ns);
        told.insert("at_ms".into(), short(ms(at_ns)));
    }
    json!({
        "paused_ms": short(ms(left.last_ns)),
        "resumed_ms": short(ms(there.first_ns)),
        "complete_ms": short(ms(complete_ns)),
        "wire_mb_s": wire.filter(|(at_ms, _)| is_near(at_ms)).map(|(at_ms, mb_s)| json!([short(at_ms), short(mb_s)])).collect::<Value>(),
        "source_writes_s": rates(&left.writes),
        "destination_writes_s": rates(&writes(&there.done_ns, there.first_ns)),
        "copying": copying,
    })
}

fn short(value: f64) -> Value {
    json!((value * 100.0).round() / 100.0)
}
