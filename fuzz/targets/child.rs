//! What passes between parent and child: lines of JSON, the ticket, dumps of frames.

use noblink::update::gates::FrameDump;
use noblink::update::gates::wire::{Line, Task, Ticket};
use noblink::vision::letterbox::{Fit, Geometry};
use noblink::vision::preprocess::{Order, Plan, Scale, Target};

use super::sentence;

pub fn check(data: &[u8]) {
    for text in data.split(|b| *b == b'\n') {
        if let Some(line) = Line::read(text) {
            let printed = serde_json::to_vec(&line).expect("lines are plain data");
            let again = Line::read(&printed).expect("what is printed is read");
            assert_eq!(std::mem::discriminant(&line), std::mem::discriminant(&again));
            if let (Line::Report(line), Line::Report(again)) = (line, again) {
                assert_eq!((line.nonce, line.refused), (again.nonce, again.refused));
                assert_eq!((line.ask, line.gates.len()), (again.ask, again.gates.len()));
            }
        }
    }
    if let Ok(ticket) = serde_json::from_slice::<Ticket>(data) {
        let printed = serde_json::to_vec(&ticket).expect("a ticket is plain data");
        let again: Ticket = serde_json::from_slice(&printed).expect("what is printed is read");
        assert_eq!((ticket.nonce, ticket.parent), (again.nonce, again.parent));
        match (ticket.task, again.task) {
            (Task::Prove(asked), Task::Prove(again)) => {
                assert_eq!(asked.candidate.file, again.candidate.file)
            }
            (Task::Tune(asked), Task::Tune(again)) => assert_eq!(asked.pictures, again.pictures),
            (asked, again) => panic!("{asked:?} became {again:?}"),
        }
    }
    match FrameDump::read_from(data) {
        Ok(dump) => pictured(data, &dump),
        Err(why) => sentence(&why),
    }
}

/// A dump has all its planes: it can be looked at to its last pixel.
fn pictured(data: &[u8], dump: &FrameDump) {
    let picture = dump.picture();
    let input = (64, 32);
    let mut tensor = vec![f32::NAN; 3 * input.0 * input.1];
    let place = Geometry::new(Fit::Letterbox, (picture.width, picture.height), input);
    let mut plan = Plan::new(place, Order::Rgb, Scale::Unit);
    let mut target = Target::F32(&mut tensor);
    plan.write_bars(&mut target);
    plan.write(&picture, &mut target).expect("its planes are whole");
    assert!(tensor.iter().all(|v| (0.0..=1.0).contains(v)));
    let mut printed = Vec::new();
    dump.write_to(&mut printed).expect("memory takes it");
    assert_eq!(FrameDump::read_from(&printed[..]).as_ref(), Ok(dump));
    assert!(printed.len() <= data.len() + 4096);
}
