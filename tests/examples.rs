//! The examples as a user runs them: as processes, judged by exit code and by what they print.
//!
//! Goal: no example rots, the program in README.md is the one that is compiled and run here, and the live migration and the game end
//! with a clear word, and with nothing left behind, when either of their processes is killed. Method: `--quick`, and signals at moments that its own
//! output announces. That no process is left shows at the standard error stream, which all of them hold: it ends with the last.

mod common;

use common::uffd;
use pageferry::Identity;
use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// For whatever a run does next. A quick run takes 8 s on 2 idle cores.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn quickstart_reads_memory_of_another_program() {
    if !uffd() {
        return;
    }
    let run = Run::start("quickstart", &["--quick"]).finish();
    assert!(run.status.success(), "{run:?}");
    assert!(run.out.contains("byte 12345678 is 7; ") && run.out.ends_with("16384 of 16384 pages are here\n"), "{run:?}");
}

#[test]
fn a_file_of_another_process_is_mounted_read_and_written() {
    if !uffd() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    // A last page that is not whole.
    let mut content: Vec<u8> = (0u32..1 << 20).flat_map(u32::to_le_bytes).chain([1, 2, 3]).collect();
    std::fs::create_dir(path("files")).unwrap();
    std::fs::write(path("files/disk.img"), &content).unwrap();
    let key = path("guest.pem");
    let id = Run::start("mount", &["id", "--key", &key]).finish();
    let id = id.out.trim();
    let mut serving = Run::start("mount", &["serve", "--writable", "--listen", "127.0.0.1:0", "--allow", id, &path("files")]);
    let served = serving.until("served at ");
    let words: Vec<&str> = served.split(' ').collect();
    let map =
        |more: &[&str]| serving.beside("mount", &[&["map", "--key", &key, words[2], words[4], "disk.img"], more].concat()).finish();
    let over_a_link = &["--rtt", "5ms", "--jitter", "1ms", "--rate", "50MB/s", "--loss", "1%"][..];
    let runs = [(&[][..], false), (over_a_link, false), (&["--direct"][..], false), (&["--write", "here is something"][..], true)];
    for (more, write) in runs {
        if write {
            content[..17].copy_from_slice(b"here is something");
        }
        let mapped = map(more);
        assert!(mapped.status.success() && mapped.out.contains(&format!("blake3 {}", blake3::hash(&content))), "{mapped:?}");
        assert_eq!(std::fs::read(path("files/disk.img")).unwrap(), content);
    }
    let refused = serving.beside("mount", &["map", "--key", &key, words[2], words[4], "another"]).finish();
    assert!(!refused.status.success() && refused.err.contains("another"), "{refused:?}");
    signal("TERM", serving.child.id());
    assert_eq!(serving.finish().status.code(), Some(143));
}

#[test]
fn a_working_set_that_was_recorded_comes_first_in_the_next_start() {
    if !uffd() {
        return;
    }
    let run = Run::start("working_set", &["--quick"]).finish();
    assert!(run.took < LIMIT, "{run:?}");
    assert!(run.status.success(), "{run:?}");
    for shown in
        ["STARTS, ", "  record ", "  plain ", "  replay ", "the record of 256 pages is what was touched", "the proof       HOLDS: "]
    {
        assert!(run.out.contains(shown), "{shown:?} is missing: {run:?}");
    }
    assert!(!run.out.contains("NOT EQUAL"), "{run:?}");
    // Each of 256 touches on demand waits at least the 10 ms of the link; replayed, a few do. The third part holds on a machine that has other work, too.
    let gain = run.out.lines().find_map(|line| line.trim().strip_prefix("replayed it is ")?.split(' ').next()?.parse().ok());
    assert!(gain.is_some_and(|gain: f64| gain > 3.0), "{gain:?}: {run:?}");
    // Without the order the last page of the set comes when nearly all of the image's 32 MiB have come.
    let replay = run.out.lines().find(|line| line.starts_with("  replay   first "));
    let here = replay.and_then(|line| line.split_once("by the end ")?.1.split(' ').next()?.parse().ok());
    assert!(here.is_some_and(|mib: u64| mib < 16), "{here:?}: {run:?}");
}

#[test]
fn a_start_of_a_program_ends_when_its_host_is_killed() {
    if !uffd() {
        return;
    }
    let mut run = Run::start("working_set", &["--quick", "--rtt", "2s"]);
    run.until("start record is process");
    run.child.kill().unwrap();
    let run = run.finish();
    assert!(run.err.contains("working_set, start Record: the host ended"), "{run:?}");
}

#[test]
fn live_migration_runs_over_a_link_that_is_long_and_loses_some() {
    if !uffd() {
        return;
    }
    let run = Run::start("live_migration", &["--quick", "--size", "8", "--rtt", "25ms", "--loss", "0.1%"]).finish();
    assert!(run.status.success() && run.out.contains("the proof             HOLDS: "), "{run:?}");
    // A word to the destination and one back. The figure is followed by its unit.
    let downtime = run.out.lines().find_map(|line| line.trim().strip_prefix("downtime")?.trim().split(',').next());
    let ms = downtime.and_then(|downtime| downtime.strip_suffix(" ms")?.parse().ok());
    assert!(ms.is_some_and(|ms: f64| ms > 20.0), "{downtime:?}: {run:?}");
}

#[test]
fn live_migration_loses_nothing() {
    if !uffd() {
        return;
    }
    let run = Run::start("live_migration", &["--quick"]).finish();
    assert!(run.took < LIMIT, "{run:?}");
    assert!(run.status.success(), "{run:?}");
    for shown in ["downtime ", "page faults ", "TIMELINE of ", "counters found ", "BLAKE3 found ", "the proof             HOLDS: "]
    {
        assert!(run.out.contains(shown), "{shown:?} is missing: {run:?}");
    }
    assert!(!run.out.contains("NOT EQUAL") && !run.out.contains("not measured"), "{run:?}");
}

#[test]
fn a_destination_killed_before_the_handover_leaves_the_program_at_the_source() {
    if !uffd() {
        return;
    }
    let mut run = Run::start("live_migration", &["--quick", "--size", "8", "--seconds", "3600"]);
    let destination = run.destination();
    signal("KILL", destination);
    let run = run.finish();
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    assert!(run.err.contains(&format!("the destination, process {destination}, died: signal: 9 (SIGKILL)")), "{run:?}");
    assert!(run.err.contains("the program had not changed hands"), "{run:?}");
}

#[test]
fn a_destination_killed_after_the_handover_is_not_replaced_by_the_source() {
    if !uffd() {
        return;
    }
    let mut run = Run::start("live_migration", &["--quick", "--size", "8", "--seconds", "3"]);
    let destination = run.destination();
    run.until("pages follow it");
    signal("KILL", destination);
    let run = run.finish();
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    assert!(run.err.contains("died: signal: 9 (SIGKILL)") && run.err.contains("the program had changed hands"), "{run:?}");
}

#[test]
fn a_destination_ends_when_its_source_is_killed() {
    if !uffd() {
        return;
    }
    for (moment, word) in [
        ("the source is process", "the source ended before it handed the program over"),
        ("pages follow it", "the source ended; the program has all its pages"),
    ] {
        let mut run = Run::start("live_migration", &["--quick", "--size", "8", "--seconds", "3"]);
        run.until(moment);
        run.child.kill().unwrap();
        let run = run.finish();
        assert!(run.err.contains(word), "{word:?} is missing: {run:?}");
    }
}

#[test]
fn ctrl_c_ends_both_processes() {
    if !uffd() {
        return;
    }
    let mut run = Run::start("live_migration", &["--quick", "--size", "8", "--seconds", "3600"]);
    run.destination();
    signal("INT", run.child.id());
    let run = run.finish();
    assert_eq!(run.status.code(), Some(130), "{run:?}");
    assert!(run.err.contains("ended by Ctrl-C"), "{run:?}");
}

#[test]
fn sqlite_loses_no_transaction() {
    if !uffd() {
        return;
    }
    let run = Run::start("sqlite", &["--quick"]).finish();
    assert!(run.took < LIMIT, "{run:?}");
    assert!(run.status.success(), "{run:?}");
    for shown in [
        "strategy        hybrid",
        "  A to B ",
        "  B to A ",
        "without a gap or a repetition",
        "integrity_check ok",
        "the proof       HOLDS: ",
    ] {
        assert!(run.out.contains(shown), "{shown:?} is missing: {run:?}");
    }
    assert!(run.out.contains(" entries, 0 wrong") && run.out.contains(": 0 balances wrong, 0 profiles wrong"), "{run:?}");
}

#[test]
fn sqlite_ends_when_one_of_its_processes_is_killed() {
    if !uffd() {
        return;
    }
    for (strategy, which) in [("post-copy", Some("A")), ("pre-copy", Some("B")), ("hybrid", None)] {
        let mut run = Run::start("sqlite", &["--quick", "--size", "4", "--seconds", "120", "--strategy", strategy]);
        let line = run.until("host A is process");
        run.until("the bank is open at A");
        match which {
            None => run.child.kill().unwrap(),
            Some(host) => {
                let id = line.rsplit(' ').nth(if host == "A" { 4 } else { 0 }).unwrap().trim_end_matches(',');
                signal("KILL", id.parse().unwrap());
            }
        }
        // That this returns says that all three have ended.
        let run = run.finish();
        assert!(!run.status.success() && run.out.is_empty(), "{run:?}");
        if let Some(host) = which {
            assert!(
                run.err.contains(&format!("sqlite: host {host}, process ")) && run.err.contains(", died: signal: 9 (SIGKILL)"),
                "{run:?}"
            );
        }
    }
}

#[test]
fn a_game_that_moves_by_any_strategy_is_the_same_game() {
    if !uffd() {
        return;
    }
    for (strategy, missing) in [("post-copy", None), ("pre-copy", Some("0 of ")), ("hybrid", None)] {
        let run = Run::start("game", &["--quick", "--strategy", strategy]).finish();
        assert!(run.took < LIMIT, "{run:?}");
        assert!(run.status.success(), "{run:?}");
        let missing = format!("missing at handover   {}", missing.unwrap_or_default());
        let strategy = format!("strategy              {strategy}\n");
        for shown in
            [&missing, &strategy, "downtime ", "last tick to first ", "TICKS ", "^ the handover", "the proof             HOLDS: "]
        {
            assert!(run.out.contains(shown), "{shown:?} is missing: {run:?}");
        }
        assert!(!run.out.contains("NOT EQUAL") && !run.out.contains("not measured"), "{run:?}");
        // Before the handover, while pages arrive and after.
        let after = run.out.lines().find(|line| line.starts_with("  after the last page"));
        let made: u64 = after.and_then(|line| line.split_whitespace().nth(4)?.replace(',', "").parse().ok()).unwrap_or(0);
        assert!(made > 10, "{made} ticks in two seconds: {run:?}");
    }
}

#[test]
fn a_game_whose_destination_is_killed_before_the_handover_goes_on_at_the_source() {
    if !uffd() {
        return;
    }
    let mut run = Run::start("game", &["--quick", "--size", "4", "--seconds", "3600"]);
    let destination = run.destination();
    run.until("the game runs at the source");
    signal("KILL", destination);
    let run = run.finish();
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    assert!(run.err.contains(&format!("the destination, process {destination}, died: signal: 9 (SIGKILL)")), "{run:?}");
    assert!(run.err.contains("it went on at the source") && run.err.contains("the proof HOLDS there"), "{run:?}");
}

#[test]
fn a_game_that_has_left_ends_with_whoever_is_killed() {
    if !uffd() {
        return;
    }
    let start = || {
        let mut run = Run::start("game", &["--quick", "--size", "4", "--seconds", "3"]);
        let destination = run.destination();
        run.until("every page has come");
        (run, destination)
    };
    let (run, destination) = start();
    signal("KILL", destination);
    let run = run.finish();
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    assert!(run.err.contains("died: signal: 9 (SIGKILL)") && run.err.contains("had changed hands, so it is lost"), "{run:?}");

    let (mut run, _) = start();
    run.child.kill().unwrap();
    let run = run.finish();
    assert!(run.err.contains("the source ended; the game has all its pages"), "{run:?}");
}

#[test]
fn a_game_moves_between_two_terminals() {
    if !uffd() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let keys = ["source.pem", "destination.pem"].map(|name| directory.path().join(name).to_str().unwrap().to_owned());
    let ids = [0, 1].map(|end| {
        let identity = Identity::generate().unwrap();
        identity.save(&keys[end]).unwrap();
        identity.peer_id().to_string()
    });
    let options = ["--quick", "--size", "4", "--seconds", "1"];
    let listen = ["source", "--listen", "127.0.0.1:0", "--key", &keys[0], "--peer", &ids[1]];
    let mut source = Run::start("game", &[&listen[..], &options].concat());
    let address = source.until("the game runs, and may be taken at").rsplit(' ').next().unwrap().to_owned();
    let connect = ["destination", "--connect", &address, "--key", &keys[1], "--peer", &ids[0]];
    let destination = source.beside("game", &[&connect[..], &options].concat()).finish();
    let source = source.finish();
    assert!(source.status.success() && destination.status.success(), "{source:?} {destination:?}");
    assert!(source.out.contains("SOURCE\n  downtime ") && source.err.contains("the game has left the source"), "{source:?}");
    assert!(destination.out.contains("the proof             HOLDS: "), "{destination:?}");
}

#[test]
fn the_program_in_the_readme_is_the_quickstart() {
    let quickstart = include_str!("../examples/quickstart.rs");
    let lines = quickstart.lines().count();
    assert!(lines < 40, "{lines} lines are no quick start");
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap_or_else(|error| panic!("README.md: {error}"));
    let blocks: Vec<&str> = readme.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.contains(&quickstart), "no ```rust block of README.md is examples/quickstart.rs, word for word");
}

/// Builds the examples once, and says where one is. `cargo test` itself builds an example that has tests of its own only as a test.
fn example(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        // target/PROFILE/deps/examples-HASH is this test.
        let this = std::env::current_exe().unwrap();
        let profile = this.ancestors().nth(2).unwrap();
        let mut cargo = Command::new(option_env!("CARGO").unwrap_or("cargo"));
        cargo.args(["build", "--quiet", "--examples", "--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
        cargo.arg("--target-dir").arg(profile.parent().unwrap());
        cargo.args(profile.ends_with("release").then_some("--release"));
        assert!(cargo.status().unwrap().success(), "the examples do not build");
        profile.join("examples")
    });
    folder.join(name)
}

/// Sends a signal. The shell's own `kill` is on every machine.
fn signal(name: &str, process: u32) {
    let sent = Command::new("sh").arg("-c").arg(format!("kill -{name} {process}")).status().unwrap();
    assert!(sent.success(), "no signal {name} to process {process}");
}

/// A run of an example. Dropped, it is killed, and what it started ends with it.
struct Run {
    /// One run at a time: a run takes all of a small machine, and its limits are meant for one. `None` beside another that has it.
    _alone: Option<MutexGuard<'static, ()>>,
    begun: Instant,
    child: Child,
    lines: Receiver<String>,
    seen: String,
}

/// What a run came to.
#[derive(Debug)]
struct Finished {
    took: Duration,
    status: ExitStatus,
    out: String,
    err: String,
}

impl Run {
    fn start(name: &str, arguments: &[&str]) -> Run {
        static ALONE: Mutex<()> = Mutex::new(());
        Run::begin(Some(ALONE.lock().unwrap_or_else(PoisonError::into_inner)), name, arguments)
    }

    /// A second one, for an example with two ends.
    fn beside(&self, name: &str, arguments: &[&str]) -> Run {
        Run::begin(None, name, arguments)
    }

    fn begin(alone: Option<MutexGuard<'static, ()>>, name: &str, arguments: &[&str]) -> Run {
        let mut command = Command::new(example(name));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let begun = Instant::now();
        let mut child = command.spawn().unwrap();
        let err = BufReader::new(child.stderr.take().unwrap());
        let (line, lines) = channel();
        // Ends with the last process that holds the stream.
        thread::spawn(move || err.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        Run { _alone: alone, begun, child, lines, seen: String::new() }
    }

    /// Waits for the next line of standard error; `None` at its end.
    fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(LIMIT) {
            Ok(line) => {
                self.seen += &line;
                self.seen.push('\n');
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("nothing for {LIMIT:?} after:\n{}", self.seen),
        }
    }

    /// Waits for a line of standard error that starts so.
    fn until(&mut self, start: &str) -> String {
        loop {
            match self.line() {
                Some(line) if line.starts_with(start) => return line,
                Some(_) => {}
                None => panic!("{start:?} did not come:\n{}", self.seen),
            }
        }
    }

    /// The id of the destination's process.
    fn destination(&mut self) -> u32 {
        let line = self.until("the source is process");
        line.rsplit(' ').next().and_then(|id| id.parse().ok()).unwrap_or_else(|| panic!("no process id in {line:?}"))
    }

    fn finish(mut self) -> Finished {
        while self.line().is_some() {}
        // Nobody holds the streams any more: neither call waits long.
        let mut out = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        Finished { took: self.begun.elapsed(), status: self.child.wait().unwrap(), out, err: std::mem::take(&mut self.seen) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Ended already in a test that passes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
