//! The same move by QEMU, where it is installed.
//!
//! Role: moves a guest with the content and the load of bench `migration` between two QEMU processes, over plain TCP. Neighbours: `guest` is the program in it; the bench puts the figures
//! beside pageferry's. Invariants: what is measured at both is measured in the same way, by the clock of this machine and by the loopback device; both processes end with
//! the move, however that ends; the guest's memory is compared, and the guest must go on at the destination.

use super::{
    MIB, PAGE_BYTES, Result,
    guest::{self, BESIDE_BYTES, COUNTS, Counts, PAYLOAD, boot_image},
    measure::{a_gib, loopback_bytes},
    pages::Image,
    writer::now_ns,
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

const PROGRAM: &str = "qemu-system-x86_64";
/// Nothing here takes as long on a machine that works.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// A guest that takes longer to begin is not run by the processor itself but by a KVM that reads its instructions one by one (seen with KVM inside a virtual
/// machine: 2.7 s, 5 us an instruction); QEMU's own translation does better then (0.1 s).
const KVM_LIMIT: Duration = Duration::from_secs(1);
/// How much of the guest's memory is saved and compared at once.
const PIECE_BYTES: u64 = 32 * MIB;
/// Bytes a second, in place of QEMU's limit of 128 MiB: more than loopback carries.
const NO_LIMIT: u64 = 100_000_000_000;

/// What one move cost.
pub struct QemuMove {
    pub total_s: f64,
    /// From the source's STOP to the destination's RESUME.
    pub downtime_ms: f64,
    /// How long the guest's operations took at the destination until every page was there.
    pub blocked_ms: f64,
    /// The same as QEMU counts it: how long its processor waited for pages.
    pub blocktime_ms: f64,
    pub sent_mb: f64,
    pub faults: f64,
    pub writer_ratio: f64,
    pub cpu_s_gib: f64,
}

/// An installed QEMU, and the files that its guests start from.
pub struct Qemu {
    folder: TempDir,
    /// As JSON and notes have it.
    pub about: String,
    accelerator: &'static str,
}

impl Qemu {
    /// Why there is none, if there is none.
    pub fn find(image: &Image) -> Result<Qemu> {
        let version = Command::new(PROGRAM).arg("--version").stderr(Stdio::null()).output();
        let version = version.map_err(|error| format!("{PROGRAM}: {error}"))?.stdout;
        let version = String::from_utf8_lossy(&version);
        let version = version.split_whitespace().nth(3).ok_or("it does not say its version")?;
        let mut qemu = Qemu { folder: tempfile::tempdir()?, about: String::new(), accelerator: "kvm" };
        fs::write(qemu.file("boot"), boot_image())?;
        let may_kvm = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if may_kvm && qemu.begins_within(KVM_LIMIT).is_ok() {
            qemu.about = format!("QEMU {version} with KVM");
        } else {
            qemu.accelerator = "tcg";
            qemu.begins_within(ANSWER_LIMIT)?;
            let why = if may_kvm { "KVM is slower here" } else { "no KVM here" };
            qemu.about = format!("QEMU {version}, instructions translated ({why})");
        }
        let mut payload = std::io::BufWriter::new(fs::File::create(qemu.file("payload"))?);
        let mut page_bytes = vec![0; PAGE_BYTES as usize];
        payload.write_all(&page_bytes)?;
        for page in 1..image.pages() {
            image.fill(page, &mut page_bytes);
            payload.write_all(&page_bytes)?;
        }
        payload.flush()?;
        Ok(qemu)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn begins_within(&self, limit: Duration) -> Result<()> {
        Machine::start(self, "probe", 128 * MIB, &[])?.begun(limit).map(|_| ())
    }

    /// One move of a guest whose memory is that of `image`, after it ran for `before`. Post-copy is from the beginning, as pageferry's is.
    pub fn run(&self, image: &Image, is_post: bool, before: Duration) -> Result<QemuMove> {
        let bytes = image.pages() * PAGE_BYTES;
        let loader = format!("loader,file={},addr={PAYLOAD:#x},force-raw=on", self.file("payload").display());
        let mut source = Machine::start(self, "source", bytes + BESIDE_BYTES, &["-device", &loader])?;
        let mut destination = Machine::start(self, "destination", bytes + BESIDE_BYTES, &["-incoming", "defer"])?;
        source.enable(&["events", "postcopy-ram"][..1 + usize::from(is_post)])?;
        destination.enable(&["events", "postcopy-ram", "postcopy-blocktime"][..1 + 2 * usize::from(is_post)])?;
        source.ask("migrate-set-parameters", json!({ "max-bandwidth": NO_LIMIT }))?;
        destination.ask("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let listens = destination.ask("query-migrate", json!({}))?;
        let port = listens.pointer("/socket-address/0/port").and_then(Value::as_str).ok_or("it does not say its port")?;

        let (began, start) = (source.begun(ANSWER_LIMIT)?, Instant::now());
        std::thread::sleep(before);
        let at_source = source.counts()?;
        let rate_before = f64::from(at_source.operations - began.operations) / start.elapsed().as_secs_f64();

        let (cpu_before_s, sent_before) = (source.cpu_s()? + destination.cpu_s()?, loopback_bytes()?);
        let asked_ns = now_ns();
        source.ask("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
        if is_post {
            source.ask("migrate-start-postcopy", json!({}))?;
        }
        let complete_ns = destination.event_ns("MIGRATION", Some("completed"))?;
        let there = destination.counts()?;
        source.event_ns("MIGRATION", Some("completed"))?;
        let (sent, cpu_s) = (loopback_bytes()? - sent_before, source.cpu_s()? + destination.cpu_s()? - cpu_before_s);
        let left = source.counts()?;

        let total_s = complete_ns.saturating_sub(asked_ns) as f64 / 1e9;
        let stopped_ns = source.event_ns("STOP", None)?;
        let resumed_ns = destination.event_ns("RESUME", None)?;
        let told = source.ask("query-migrate", json!({}))?;
        let told_there = destination.ask("query-migrate", json!({}))?;
        let ms = |told: &Value, key: &str| told.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        eprintln!(
            "  {}: {total_s:.2} s, by QEMU's own account {} ms with {} bytes; its downtime {} ms; {rate_before:.0} operations a second before",
            if is_post { "post-copy" } else { "pre-copy" },
            ms(&told, "total-time"),
            told.pointer("/ram/transferred").unwrap_or(&Value::Null),
            ms(&told, "downtime"),
        );

        // It runs there.
        destination.counts_above(there.operations)?;
        destination.ask("stop", json!({}))?;
        let last = destination.counts()?;
        self.check(&mut destination, image, last.operations)?;
        Ok(QemuMove {
            total_s,
            downtime_ms: resumed_ns.saturating_sub(stopped_ns) as f64 / 1e6,
            blocked_ms: there.took_ms_since(&left),
            blocktime_ms: ms(&told_there, "postcopy-blocktime"),
            sent_mb: sent as f64 / 1e6,
            faults: told.pointer("/ram/postcopy-requests").and_then(Value::as_f64).unwrap_or(0.0),
            writer_ratio: f64::from(there.operations - at_source.operations) / total_s / rate_before,
            cpu_s_gib: a_gib(cpu_s, bytes),
        })
    }

    /// Compares the memory of a guest that stands still.
    fn check(&self, machine: &mut Machine, image: &Image, operations: u32) -> Result<()> {
        let (file, mut piece, bytes) = (self.file("piece"), Vec::new(), image.pages() * PAGE_BYTES);
        guest::check(image, operations, |page, into| {
            let at = page * PAGE_BYTES;
            if at.is_multiple_of(PIECE_BYTES) {
                let size = PIECE_BYTES.min(bytes - at);
                machine.ask("pmemsave", json!({ "val": PAYLOAD + at, "size": size, "filename": file }))?;
                piece = fs::read(&file)?;
            }
            let at = (at % PIECE_BYTES) as usize;
            into.copy_from_slice(piece.get(at..at + into.len()).ok_or("QEMU saved less than was asked for")?);
            Ok(())
        })
    }
}

/// A QEMU process, with the connection over which it is told what to do (QMP).
struct Machine {
    name: &'static str,
    process: Process,
    to: UnixStream,
    from: BufReader<UnixStream>,
    events: Vec<Value>,
    /// Where its complaints are.
    log: PathBuf,
}

impl Machine {
    fn start(qemu: &Qemu, name: &'static str, memory_bytes: u64, more: &[&str]) -> Result<Machine> {
        let (socket, log) = (qemu.file(name), qemu.file("log").with_extension(name));
        // Of the machine before, in an earlier round.
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(PROGRAM);
        command.args(["-M", "pc", "-display", "none", "-nodefaults", "-no-user-config", "-accel", qemu.accelerator]);
        command.args(["-m", &format!("{}M", memory_bytes / MIB)]).arg("-kernel").arg(qemu.file("boot"));
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]).args(more);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?).spawn()?;
        let mut process = Process(child);
        let to = connect(&socket, &mut process).map_err(|error| complaint(name, &log, &error.to_string()))?;
        to.set_read_timeout(Some(ANSWER_LIMIT))?;
        let from = BufReader::new(to.try_clone()?);
        let mut machine = Machine { name, process, to, from, events: Vec::new(), log };
        // Its greeting.
        machine.line()?;
        machine.ask("qmp_capabilities", json!({}))?;
        Ok(machine)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(0) => Err(complaint(self.name, &self.log, "it is gone")),
            Ok(_) => Ok(serde_json::from_str(&line)?),
            Err(error) => Err(complaint(self.name, &self.log, &format!("no word for {ANSWER_LIMIT:?}: {error}"))),
        }
    }

    /// Gives a command and waits for its answer; what happens meanwhile is kept.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        writeln!(self.to, "{}", json!({ "execute": command, "arguments": arguments }))?;
        loop {
            let mut line = self.line()?;
            if line.get("event").is_some() {
                self.events.push(line);
            } else if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            } else {
                return Err(format!("QEMU, the {}: {command}: {}", self.name, line["error"]).into());
            }
        }
    }

    fn enable(&mut self, capabilities: &[&str]) -> Result<()> {
        let enabled = |name: &&str| json!({ "capability": name, "state": true });
        let capabilities: Vec<Value> = capabilities.iter().map(enabled).collect();
        self.ask("migrate-set-capabilities", json!({ "capabilities": capabilities })).map(|_| ())
    }

    /// When an event came, by the system's clock: the last of that name and, if one is asked for, status. Waits for it.
    fn event_ns(&mut self, name: &str, status: Option<&str>) -> Result<u64> {
        let of = |event: &Value| event.pointer("/data/status").and_then(Value::as_str).map(str::to_owned);
        loop {
            let named = |event: &&Value| event["event"] == name;
            if self.events.iter().filter(named).any(|event| of(event).as_deref() == Some("failed")) {
                return Err(complaint(self.name, &self.log, "the migration failed"));
            }
            let found = self.events.iter().rev().filter(named).find(|event| status.is_none() || of(event).as_deref() == status);
            if let Some(event) = found {
                let part = |unit: &str| event["timestamp"][unit].as_u64().ok_or("an event does not say when it was");
                return Ok(part("seconds")? * 1_000_000_000 + part("microseconds")? * 1000);
            }
            let line = self.line()?;
            self.events.push(line);
        }
    }

    fn counts(&mut self) -> Result<Counts> {
        self.counts_or_none()?.ok_or_else(|| "the guest's program does not count".into())
    }

    fn counts_or_none(&mut self) -> Result<Option<Counts>> {
        let command = format!("xp /{COUNTS}wx {PAYLOAD:#x}");
        let answer = self.ask("human-monitor-command", json!({ "command-line": command }))?;
        let text = answer.as_str().and_then(|text| text.split_once(": ")).ok_or("QEMU shows no memory")?.1;
        let words = text.split_whitespace().map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16));
        let words: Vec<u32> = words.collect::<std::result::Result<_, _>>()?;
        Ok(Counts::read(words.try_into().map_err(|_| "QEMU shows more or less memory than was asked for")?))
    }

    /// Waits until the program has begun.
    fn begun(&mut self, limit: Duration) -> Result<Counts> {
        self.counted(limit, 0)
    }

    /// Waits until it has done more than that.
    fn counts_above(&mut self, operations: u32) -> Result<Counts> {
        self.counted(ANSWER_LIMIT, operations)
    }

    fn counted(&mut self, limit: Duration, above: u32) -> Result<Counts> {
        let start = Instant::now();
        loop {
            match self.counts_or_none()? {
                Some(counts) if counts.operations > above => return Ok(counts),
                _ if start.elapsed() > limit => {
                    return Err(complaint(self.name, &self.log, &format!("its guest did not go on within {limit:?}")));
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// CPU seconds of the process so far.
    fn cpu_s(&self) -> Result<f64> {
        /// Linux counts for programs in hundredths of a second on every architecture (`USER_HZ`).
        const TICKS_S: f64 = 100.0;
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.0.id()))?;
        // Fields 14 and 15 of proc_pid_stat(5), counted from behind the name.
        let (_, fields) = stat.rsplit_once(") ").ok_or("/proc/PID/stat has another form")?;
        let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<f64>);
        Ok(ticks.sum::<std::result::Result<f64, _>>()? / TICKS_S)
    }
}

/// Ends with this, however that ends.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing can be done about a child that cannot be killed or waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU makes its socket after it has read its arguments.
fn connect(socket: &Path, process: &mut Process) -> Result<UnixStream> {
    loop {
        match UnixStream::connect(socket) {
            Ok(connected) => return Ok(connected),
            Err(error) => match process.0.try_wait()? {
                Some(status) => return Err(format!("it ended at once ({status}; {error})").into()),
                None => std::thread::sleep(Duration::from_millis(5)),
            },
        }
    }
}

/// What went wrong, with what QEMU wrote about it.
fn complaint(name: &str, log: &Path, what: &str) -> super::AnyError {
    let wrote = fs::read_to_string(log).unwrap_or_default();
    format!("QEMU, the {name}: {what} {}", wrote.trim()).into()
}
