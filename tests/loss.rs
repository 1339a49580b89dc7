//! A store that is away, lost or wrong: each thread that waits gets an answer within the bound, and never a zero (S1, S3).

mod common;

use async_trait::async_trait;
use common::*;
use nix::errno::Errno;
use pageferry::{
    Content, Extent, FaultAround, Loss, LossPolicy, MemoryStore, OnLoss, PageSize, PageStore, Pull, Region, RegionError,
    RegionEvent, Run, StoreError, Verdict, testing::Gated,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::broadcast::Receiver;

const PAGES: u64 = 64;
const BRIEF: Duration = Duration::from_millis(150);

fn away() -> StoreError {
    StoreError::Unreachable { peer: "other".into(), reason: "the test says so".into() }
}

fn policy(keep_trying: Duration, then: OnLoss) -> LossPolicy {
    LossPolicy { keep_trying, then }
}

fn poison_after(keep_trying: Duration) -> LossPolicy {
    policy(keep_trying, OnLoss::Poison)
}

fn asked(decide: impl Fn(&Loss) -> Verdict + Send + Sync + 'static) -> LossPolicy {
    policy(Duration::ZERO, OnLoss::Ask(Arc::new(decide)))
}

fn region(store: impl PageStore, loss: LossPolicy) -> Region {
    Region::builder().name("world").store(store).pager(&pager()).fault_around(FaultAround::OFF).loss(loss).open().unwrap()
}

/// A region whose store fails each read with `error`, and the gate to heal it.
fn failing(error: StoreError, loss: LossPolicy) -> (Region, Gated<MemoryStore>) {
    let store = gated(PAGES);
    store.open();
    store.fail_next(usize::MAX, error);
    (region(store.clone(), loss), store)
}

/// A look at a missing page from inside a system call: its bytes, or that they are lost.
fn look(region: &Region, page: u64) -> Result<Vec<u8>, ()> {
    peek(address_of(region, page)).map_err(|errno| assert!([Errno::EFAULT, Errno::EHWPOISON].contains(&errno), "{errno}"))
}

#[track_caller]
fn assert_lost(region: &Region, page: u64) -> StoreError {
    assert_eq!(look(region, page), Err(()), "page {page}");
    let error = region.read_at(page * PAGE as u64 + 5, &mut [0; 9]).unwrap_err();
    assert_eq!(region.write_at(page * PAGE as u64, &[1]).unwrap_err().to_string(), error.to_string());
    match error {
        RegionError::Lost { extent, cause } if extent.contains(page) => cause,
        other => panic!("page {page}: {other}"),
    }
}

fn news(events: &mut Receiver<RegionEvent>) -> Vec<String> {
    std::iter::from_fn(|| events.try_recv().ok())
        .map(|event| match event {
            RegionEvent::StoreAway { .. } => "away".to_owned(),
            RegionEvent::StoreBack => "back".to_owned(),
            RegionEvent::Lost { extent, .. } => format!("lost {extent}"),
            other => format!("{other:?}"),
        })
        .collect()
}

#[test]
fn a_touch_of_a_lost_page_raises_sigbus() {
    if !uffd_with_poison() {
        return;
    }
    in_child("a_touch_of_a_lost_page_raises_sigbus", "touch", || {
        let (region, _store) = failing(away(), poison_after(BRIEF));
        println!("touching");
        // SAFETY: mapped; that it raises a signal is what the scene is about.
        let read = unsafe { region.as_ptr().add(5 * PAGE).read_volatile() };
        println!("it read {read}");
    })
    .ends_by(libc::SIGBUS, "touching");
}

#[test]
fn a_store_that_stays_away_is_given_up_within_the_bound() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    let (region, store) = failing(away(), poison_after(BRIEF));
    let mut events = region.events();
    store.heal();
    assert_page(&region, 1);
    store.fail_next(usize::MAX, away());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for page in 8..56 {
            let region = &region;
            scope.spawn(move || assert_eq!(look(region, page), Err(())));
        }
    });
    let waited = start.elapsed();
    assert!(waited >= BRIEF, "given up after {waited:?}, before the policy's {BRIEF:?}");
    // Forty-eight threads are no reason to wait forty-eight times.
    assert!(waited < BRIEF * 24, "given up only after {waited:?}");
    assert!(region.stats().retries > 0);
    // What the store had answered stays; all the rest went with the store.
    assert_page(&region, 1);
    [0, 2, 9, PAGES - 1].into_iter().for_each(|page| assert!(assert_lost(&region, page).is_transient()));
    assert_eq!((region.residency().lost, region.residency().missing()), (PAGES - 1, 0));
    assert_eq!(region.stats().pages_poisoned, PAGES - 1);
    assert_eq!(news(&mut events), ["away", "lost pages 0..1", "lost pages 2..64"]);
    let range = 0..8 * PAGE as u64;
    assert!(matches!(region.populate_blocking(range), Err(RegionError::Lost { extent, .. }) if extent == Extent::page(0)));
    assert!(matches!(block_on(region.pull()), Err(RegionError::Lost { .. })));
    // Whoever discards a lost page says that its content is not needed.
    region.discard(9 * PAGE as u64..10 * PAGE as u64).unwrap();
    assert_same(9, &read_page(&region, 9), &[0; PAGE]);
}

#[test]
fn a_store_that_comes_back_in_time_loses_nothing() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let (region, store) = failing(away(), poison_after(PATIENCE));
    let mut events = region.events();
    std::thread::scope(|scope| {
        for page in 0..8 {
            let region = &region;
            scope.spawn(move || assert_page(region, page));
        }
        until("all reads were repeated", || region.stats().retries >= 16);
        store.heal();
    });
    until("the last reply is dealt with", || region.residency().resident == 8);
    assert_eq!(news(&mut events), ["away", "back"]);
    assert_eq!((region.residency().lost, region.stats().pages_poisoned), (0, 0));
}

#[test]
fn a_second_store_takes_over() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    for error in [away(), StoreError::Closed] {
        let spare = gated(PAGES);
        let (region, store) = failing(error, policy(BRIEF, OnLoss::Fallback(Arc::new(spare.clone()))));
        spare.open();
        (0..PAGES).for_each(|page| assert_page(&region, page));
        assert_eq!(region.residency().lost, 0);
        let reads = store.reads().len();
        assert!(spare.reads().len() as u64 == PAGES && reads as u64 <= PAGES, "{reads} reads of a store that is lost");
    }
    // The spare has no spare.
    let spare = gated(PAGES);
    spare.open();
    spare.fail_next(usize::MAX, StoreError::Closed);
    let (region, _store) = failing(away(), policy(BRIEF, OnLoss::Fallback(Arc::new(spare))));
    assert_eq!(look(&region, 3), Err(()));
    assert!(matches!(assert_lost(&region, 3), StoreError::Closed));
}

#[test]
fn the_program_decides_when_asked() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    // Zeros for these pages, and the next fault asks again.
    let told = Arc::new(AtomicUsize::new(0));
    let tell = told.clone();
    let (zeroed, store) = failing(
        StoreError::Closed,
        asked(move |loss| {
            tell.fetch_add(1, Relaxed);
            assert!(
                loss.region == "world" && loss.extent == Extent::page(6) && matches!(loss.cause, StoreError::Closed),
                "{loss:?}"
            );
            Verdict::Zero
        }),
    );
    assert_same(6, &read_page(&zeroed, 6), &[0; PAGE]);
    store.heal();
    assert_page(&zeroed, 7);
    assert_eq!((told.load(Relaxed), zeroed.residency().lost, zeroed.residency().resident), (1, 0, 2));

    let (poisoned, _store) = failing(away(), asked(|_| Verdict::Poison));
    assert_eq!(look(&poisoned, 6), Err(()));

    let (panicked, _store) = failing(away(), asked(|_| panic!("the program's callback panics")));
    assert_eq!(look(&panicked, 6), Err(()));

    let spare: Arc<dyn PageStore> = Arc::new(memory(PAGES));
    let (replaced, _store) = failing(away(), asked(move |_| Verdict::Fallback(spare.clone())));
    (0..PAGES).for_each(|page| assert_page(&replaced, page));

    let (patient, store) = failing(away(), asked(|_| Verdict::KeepTrying(PATIENCE)));
    std::thread::scope(|scope| {
        scope.spawn(|| assert_page(&patient, 6));
        until("it keeps trying", || patient.stats().retries > 1);
        store.heal();
    });

    // A program that is asked again and again may change its mind.
    let asks = AtomicUsize::new(0);
    let (tired, _store) = failing(
        away(),
        asked(move |_| match asks.fetch_add(1, Relaxed) {
            0..3 => Verdict::KeepTrying(Duration::from_millis(1)),
            _ => Verdict::Poison,
        }),
    );
    assert_eq!(look(&tired, 6), Err(()));
}

/// A store that answers reads of page 3 with what `answer` makes, perhaps after a turn of the scheduler, and others as it should.
struct Answers<F> {
    store: MemoryStore,
    late: bool,
    answer: F,
}

#[async_trait]
impl<F: Fn(Extent) -> Result<Vec<Run>, StoreError> + Send + Sync + 'static> PageStore for Answers<F> {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn page_size(&self) -> PageSize {
        self.store.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        if self.late {
            tokio::task::yield_now().await;
        }
        if extent.contains(3) { (self.answer)(extent) } else { self.store.read(extent).await }
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.store.flush().await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        self.store.pull(extents).await
    }
}

fn one_page_is_lost(answer: fn(Extent) -> Result<Vec<Run>, StoreError>, cause: &str) {
    for late in [false, true] {
        let region = region(Answers { store: memory(PAGES), late, answer }, LossPolicy::default());
        assert_eq!(look(&region, 3), Err(()), "{cause}");
        let found = assert_lost(&region, 3).to_string();
        assert!(found.contains(cause), "{found:?} instead of {cause:?}");
        (0..PAGES).filter(|page| *page != 3).for_each(|page| assert_page(&region, page));
        assert_eq!((region.residency().lost, region.residency().resident), (1, PAGES - 1));
    }
}

#[test]
fn a_store_that_panics_loses_the_page_it_was_asked_for() {
    if uffd_with_poison() {
        let _watchdog = watchdog();
        one_page_is_lost(|_| panic!("the store panics, as the test wants"), "the store panicked");
    }
}

#[test]
fn an_answer_that_is_not_what_was_asked_for_is_not_installed() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    one_page_is_lost(|_| Ok(vec![]), "the answer ends at page 3");
    one_page_is_lost(|_| Ok(vec![Run::zero(Extent::page(4))]), "the answer skips from page 3 to 4");
    one_page_is_lost(|_| Ok(vec![Run::zero(Extent::between(2, 4))]), "the answer skips from page 3 to 2");
    one_page_is_lost(|_| Ok(vec![Run::zero(Extent::between(3, 5))]), "asked for pages 3..4, got pages 3..5");
    one_page_is_lost(|asked| Ok(vec![Run::zero(asked), Run::zero(Extent::page(4))]), "asked for pages 3..4, got pages 4..5");
    one_page_is_lost(|_| Ok(vec![Run::zero(Extent::between(3, 3))]), "got pages 3..3");
    one_page_is_lost(|asked| Ok(vec![Run::bytes(asked, vec![1; PAGE - 1].into())]), "expected 4096 bytes");
    one_page_is_lost(|asked| Ok(vec![Run { extent: asked, content: Content::Bytes(vec![1; 2 * PAGE].into()) }]), "got 8192");
}

#[test]
fn neighbours_that_cannot_be_read_ahead_are_not_lost() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    let answer = |_| Err(StoreError::Closed);
    let store = Answers { store: memory(PAGES), late: true, answer };
    let region = Region::builder().store(store).pager(&pager()).open().unwrap();
    assert_page(&region, 0);
    // Pages 1..16 could not be read ahead, because of page 3. They are there when they are asked for.
    (0..PAGES).filter(|page| *page != 3).for_each(|page| assert_page(&region, page));
    assert_eq!(region.residency().lost, 0);
    assert_eq!(look(&region, 3), Err(()));
    assert_eq!(region.residency().lost, 1);
}

#[test]
fn a_store_that_never_answers_is_given_up_within_the_bound() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    let region = region(store.clone(), poison_after(BRIEF));
    let start = Instant::now();
    assert_eq!(look(&region, 3), Err(()));
    // A second at least is given to every read.
    assert!((Duration::from_secs(1)..Duration::from_secs(5)).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert!(assert_lost(&region, 3).to_string().contains("did not answer a read within 1s"));
    // It did not say that it is away: only what it did not answer is lost.
    store.open();
    assert_page(&region, 4);
    assert_eq!(region.residency().lost, 1);
}

#[test]
fn a_page_that_fails_while_others_come_is_given_up_within_the_bound() {
    // Longer than a busy machine leaves a thread waiting: then nothing would come, and all be given up.
    const ENOUGH: Duration = Duration::from_secs(3);
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    let region = region(Answers { store: memory(PAGES), late: true, answer: |_| Err(away()) }, poison_after(ENOUGH));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| look(&region, 3));
        // Others come all the time, so the store is never away for as long as the policy says.
        for page in 4..PAGES {
            assert_page(&region, page);
            std::thread::sleep(ENOUGH * 5 / 4 / PAGES as u32);
        }
        assert_eq!(waits.join().unwrap(), Err(()));
    });
    assert_eq!(region.residency().lost, 1);
}
