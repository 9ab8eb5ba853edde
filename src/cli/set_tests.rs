use super::*;

/// One that waits until the devices have applied it; whether all have been named.
fn progress(answered: bool) -> Progress {
    Progress { answered, ..Progress::new("mine".into(), true, false) }
}

fn event(request_id: &str, device: &str, revision: u64, state: ConfigState) -> pb::ConfigEvent {
    let detail = if state == ConfigState::Rejected { "interval is too short".into() } else { String::new() };
    pb::ConfigEvent { request_id: request_id.into(), device: device.into(), revision, state: state.into(), detail, ..Default::default() }
}

fn failure(progress: &Progress) -> String {
    progress.outcome(Some(Duration::from_secs(30))).expect_err("not done").text()
}

#[test]
fn one_device_is_done_when_it_has_applied() {
    let mut progress = progress(true);
    for state in [ConfigState::Accepted, ConfigState::Delivered] {
        assert!(progress.event(&event("mine", "pump-1", 3, state)));
        assert!(!progress.is_over());
    }
    assert_eq!(failure(&progress), "pump-1: revision 3 is DELIVERED and not applied after 30s");
    assert!(progress.event(&event("mine", "pump-1", 3, ConfigState::Applied)));
    assert!(progress.is_over() && progress.outcome(None).is_ok());
}

#[test]
fn without_waiting_the_gateways_word_is_enough() {
    let mut progress = Progress::new("mine".into(), false, false);
    progress.event(&event("mine", "pump-1", 3, ConfigState::Accepted));
    assert!(!progress.is_over());
    progress.answered = true;
    assert!(progress.is_over() && progress.outcome(None).is_ok());
}

#[test]
fn a_selector_waits_for_all_and_tells_who_refused() {
    let mut progress = progress(false);
    progress.event(&event("mine", "pump-1", 1, ConfigState::Applied));
    assert!(!progress.is_over(), "more devices may be named");
    progress.event(&event("mine", "pump-2", 1, ConfigState::Accepted));
    progress.answered = true;
    assert!(!progress.is_over());
    progress.event(&event("mine", "pump-2", 1, ConfigState::Rejected));
    assert!(progress.is_over());
    assert_eq!(failure(&progress), "pump-2: REJECTED interval is too short");
}

#[test]
fn a_selector_that_hits_nothing_fails() {
    assert!(!progress(false).is_over());
    assert!(progress(true).is_over());
    assert!(failure(&progress(true)).contains("no device matches"));
}

#[test]
fn a_newer_revision_of_somebody_else_ends_the_wait() {
    let mut progress = progress(true);
    progress.event(&event("mine", "pump-1", 3, ConfigState::Accepted));
    assert!(!progress.event(&event("theirs", "pump-1", 2, ConfigState::Applied)), "an old step changes nothing");
    assert!(!progress.is_over());
    progress.event(&event("theirs", "pump-1", 4, ConfigState::Accepted));
    assert!(progress.is_over());
    assert_eq!(failure(&progress), "pump-1: revision 3 was replaced by revision 4");
}

#[test]
fn steps_that_a_new_stream_repeats_are_no_news() {
    let mut progress = progress(false);
    assert!(progress.event(&event("mine", "pump-1", 3, ConfigState::Delivered)));
    assert!(!progress.event(&event("mine", "pump-1", 3, ConfigState::Accepted)));
    assert!(!progress.event(&event("mine", "pump-1", 3, ConfigState::Delivered)));
}

#[test]
fn a_new_stream_answers_anew_and_refusals_are_told_once() {
    let mut progress = progress(false);
    for _ in 0..2 {
        progress.begin();
        assert!(!progress.is_over());
        progress.refusals.push("pump-1: it has changed".into());
        progress.answered = true;
        assert!(progress.is_over());
    }
    assert_eq!(failure(&progress), "pump-1: it has changed");
}

#[test]
fn a_refusal_is_told_with_the_etag_to_use() {
    let refusal = pb::ConfigRefusal {
        request_id: "mine".into(),
        device: "pump-1".into(),
        reason: "CONFIG_ETAG_MISMATCH".into(),
        message: "it has changed".into(),
        current_etag: "e7".into(),
    };
    assert_eq!(refused(&refusal), "it has changed\n  reason: CONFIG_ETAG_MISMATCH device=pump-1 current_etag=e7");
}

#[test]
fn it_is_for_one_device_or_for_a_selector() {
    let given = |first: &str, second: Option<&str>, selector: Option<&str>| {
        target(first.to_owned(), second.map(str::to_owned), selector.map(str::to_owned))
    };
    assert!(matches!(given("pump-1", Some("{}"), None), Ok((Target::Device(device), json)) if device == "pump-1" && json == "{}"));
    assert!(matches!(given("{}", None, Some("a=b")), Ok((Target::LabelSelector(selector), _)) if selector == "a=b"));
    for (first, second, selector) in [("{}", None, None), ("pump-1", Some("{}"), Some("a=b")), ("pump 1", Some("{}"), None)] {
        assert!(matches!(given(first, second, selector), Err(Failure::Usage(_))), "{first:?} {second:?} {selector:?} was taken");
    }
}
