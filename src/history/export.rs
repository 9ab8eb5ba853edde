//! An export: the readings of many devices, of which a query's piece is in memory at a time.
//!
//! It goes device by device in the order of ids, and span of time by span of time. A span begins as all the time that is asked
//! for, and is halved as often as a query of it would be too large. What is exported was read after the export began, and so has
//! all that was acknowledged before.

use super::{Answer, Piece, Query, Reader, Series};
use crate::{
    error::{Error, Failure},
    fleet::{Device, Registry},
    model::{DeviceId, LabelSelector, Timestamp},
    store::{DeviceKey, DeviceRow, SensorRow, Store},
};
use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

const DEVICES_PER_READ: usize = 1_000;

/// What to export.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Of these devices; empty: of all.
    pub devices: Vec<DeviceId>,
    /// Of devices whose labels match.
    pub labels: LabelSelector,
    /// Of these sensors; empty: of all.
    pub sensors: HashSet<String>,
    /// In this time.
    pub span: Span,
}

/// A span of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first time.
    pub start: Timestamp,
    /// The time before which it ends; `None`: there is no later time.
    pub end: Option<Timestamp>,
}

impl Span {
    /// Both parts of it, the earlier one first; `None` when it holds one point in time only.
    ///
    /// It is split at the roundest number of microseconds that is in it, in binary: by itself alone, so that an export that is
    /// gone on with splits as it did before, and its readings come in the same order.
    fn halves(self) -> Option<(Self, Self)> {
        let (first, last) = (self.start.micros(), self.end.map_or(Timestamp::MAX.micros(), |end| end.micros() - 1));
        if last <= first {
            return None;
        }
        let bit = 63 - (first ^ last).leading_zeros();
        let middle = Timestamp::from_micros(last & (-1 << bit))?;
        Some((Self { end: Some(middle), ..self }, Self { start: middle, ..self }))
    }

    /// What is left of it from the part `from` on that halving leads to: that part last, behind it what comes after.
    fn rest_from(self, from: Self) -> Vec<Self> {
        let (mut rest, mut span) = (Vec::new(), self);
        while span != from
            && let Some((earlier, later)) = span.halves()
        {
            if from.start >= later.start {
                span = later;
            } else {
                rest.push(later);
                span = earlier;
            }
        }
        rest.push(span);
        rest
    }
}

/// How far an export has come: to go on from there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// In which device.
    pub device: DeviceId,
    /// In which of its spans of time.
    pub span: Span,
    /// In which sensor.
    pub sensor: String,
    /// The last time that was exported.
    pub time: Timestamp,
    /// How many readings were exported up to here.
    pub readings: u64,
}

/// Who makes exports.
pub struct Exporter {
    store: Store,
    registry: Registry,
    reader: Reader,
    concurrent_max: usize,
    permits: Arc<Semaphore>,
}

/// See the [module](self).
pub struct Export {
    store: Store,
    registry: Registry,
    reader: Reader,
    selection: Selection,
    // Until it has been come to.
    from: Option<Place>,
    // Devices up to this id have been looked up.
    after: Option<String>,
    page: VecDeque<(DeviceRow, u64)>,
    current: Option<Current>,
    standing: Standing,
    _permit: OwnedSemaphorePermit,
}

/// What an export has behind and before it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Standing {
    /// Devices that are done.
    pub devices: u64,
    /// Devices in all.
    pub devices_total: u64,
    // Readings that are stored of those, whether they are to be exported or not.
    stored: u64,
    stored_total: u64,
}

impl Standing {
    /// How many readings the export will have, when it has so many now: as many of those to come as of those behind.
    pub fn estimate(&self, readings: u64) -> u64 {
        let share = if self.stored == 0 { 1.0 } else { (readings as f64 / self.stored as f64).min(1.0) };
        let behind = readings.min(self.stored);
        readings.max(behind + (self.stored_total.saturating_sub(self.stored) as f64 * share) as u64)
    }
}

/// The device that is being exported.
struct Current {
    device: Arc<Device>,
    // How many readings are stored of it.
    stored: u64,
    // What is still to be read, the next span last.
    spans: Vec<Span>,
    // What is being read.
    answer: Option<(Span, Answer)>,
    // Until its sensor has been come to.
    from: Option<Place>,
}

/// Readings of one sensor, in one of its device's spans of time.
pub struct Part {
    /// The device.
    pub device: Arc<Device>,
    /// The span.
    pub span: Span,
    /// The sensor.
    pub sensor: SensorRow,
    /// The readings; never none.
    pub readings: Series,
}

impl Exporter {
    /// At most `concurrent_max` exports at once.
    pub fn new(store: Store, registry: Registry, reader: Reader, concurrent_max: usize) -> Self {
        Self { store, registry, reader, concurrent_max, permits: Arc::new(Semaphore::new(concurrent_max)) }
    }

    /// Begins an export, or goes on with it from a place.
    pub async fn begin(&self, mut selection: Selection, from: Option<Place>) -> Result<Export, Failure> {
        let overloaded = |_| Error::Overloaded { setting: "export.concurrent_max", limit: self.concurrent_max };
        let permit = self.permits.clone().try_acquire_owned().map_err(overloaded)?;
        selection.devices.sort();
        selection.devices.dedup();
        if from.is_none() {
            for device in &selection.devices {
                self.registry.get(device).await?;
            }
        }
        let mut export = Export {
            store: self.store.clone(),
            registry: self.registry.clone(),
            reader: self.reader.clone(),
            selection,
            from,
            after: Some(String::new()),
            page: VecDeque::new(),
            current: None,
            standing: Standing::default(),
            _permit: permit,
        };
        export.survey().await?;
        Ok(export)
    }
}

impl Export {
    /// How far it is, by devices.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// The next readings; `None` when all are exported.
    pub async fn next(&mut self) -> Result<Option<Part>, Failure> {
        loop {
            let Some(current) = &mut self.current else {
                self.current = self.next_device().await?;
                match self.current {
                    Some(_) => continue,
                    None => return Ok(None),
                }
            };
            if let Some((span, answer)) = &mut current.answer {
                match answer.next().await? {
                    Some(Piece::Readings(sensor, readings)) => {
                        let readings = match &current.from {
                            Some(place) => behind(place, &sensor, readings),
                            None => readings,
                        };
                        let (device, span) = (current.device.clone(), *span);
                        if !readings.is_empty() {
                            return Ok(Some(Part { device, span, sensor, readings }));
                        }
                    }
                    Some(Piece::Buckets(..)) => return Err(Error::Internal.into()),
                    None => (current.answer, current.from) = (None, None),
                }
            } else if let Some(span) = current.spans.pop() {
                self.read(span).await?;
            } else {
                self.standing.devices += 1;
                self.standing.stored += current.stored;
                self.current = None;
            }
        }
    }

    /// Begins to read a span of the device at hand, or halves it.
    async fn read(&mut self, span: Span) -> Result<(), Failure> {
        let Some(current) = &mut self.current else { return Ok(()) };
        let mut sensors = self.selection.sensors.clone();
        if let Some(place) = &current.from {
            // Those that are done are not read again.
            let known = self.store.sensors(current.device.key).await?.into_iter().map(|sensor| sensor.name);
            sensors = known.filter(|name| *name >= place.sensor && (sensors.is_empty() || sensors.contains(name))).collect();
            if sensors.is_empty() {
                current.from = None;
                return Ok(());
            }
        }
        let query = Query { sensors, start_time: span.start, end_time: span.end, bucket: None };
        // One that a client takes its time with must leave room for queries, unless it can't be made smaller.
        let reader = if span.halves().is_some() && current.from.is_none() { self.reader.sparing() } else { self.reader.clone() };
        match reader.read(&current.device, query).await {
            // Of some sensors all of it has been exported, which no place in a half of it could say. What makes it too large
            // now is not merged yet, and will be.
            Err(Failure::Refused(Error::QueryTooLarge { setting, limit })) if current.from.is_some() => {
                return Err(Error::Overloaded { setting, limit }.into());
            }
            Err(Failure::Refused(Error::QueryTooLarge { setting, limit })) => {
                let (earlier, later) = span.halves().ok_or(Error::QueryTooLarge { setting, limit })?;
                current.spans.extend([later, earlier]);
            }
            answer => current.answer = Some((span, answer?)),
        }
        Ok(())
    }

    /// Counts what is to be exported, and what of that is behind the place to go on from.
    async fn survey(&mut self) -> Result<(), Failure> {
        let (mut after, mut standing) = (Some(String::new()), Standing::default());
        while let Some(from) = after {
            let (page, next) = self.read_page(&from).await?;
            for (row, stored) in page {
                standing.devices_total += 1;
                standing.stored_total += stored;
                if self.is_behind(&row.id) {
                    standing.devices += 1;
                    standing.stored += stored;
                }
            }
            after = next;
        }
        self.standing = standing;
        Ok(())
    }

    async fn next_device(&mut self) -> Result<Option<Current>, Failure> {
        loop {
            let Some((row, stored)) = self.page.pop_front() else {
                let Some(after) = self.after.take() else { return Ok(None) };
                let (page, next) = self.read_page(&after).await?;
                (self.page, self.after) = (page.into(), next);
                continue;
            };
            if self.is_behind(&row.id) {
                continue;
            }
            // When the place's device is gone, there is no part of another to leave out.
            let from = self.from.take().filter(|place| place.device == row.id);
            let whole = self.selection.span;
            let spans = from.as_ref().map_or_else(|| vec![whole], |place| whole.rest_from(place.span));
            // It may have been deleted meanwhile.
            if let Some(device) = self.registry.by_key(row.key).await? {
                return Ok(Some(Current { device, stored, spans, answer: None, from }));
            }
        }
    }

    fn is_behind(&self, device: &DeviceId) -> bool {
        self.from.as_ref().is_some_and(|place| *device < place.device)
    }

    /// Some of the devices behind the id `after` that are to be exported, with how many readings are stored of each; and the id
    /// behind which to read on.
    async fn read_page(&self, after: &str) -> Result<(Vec<(DeviceRow, u64)>, Option<String>), Failure> {
        let (mut rows, next) = if self.selection.devices.is_empty() {
            let rows = self.store.devices(after, DEVICES_PER_READ).await?;
            let next = rows.last().filter(|_| rows.len() == DEVICES_PER_READ).map(|row| row.id.to_string());
            (rows, next)
        } else {
            let mut rows = Vec::new();
            for id in &self.selection.devices {
                rows.extend(self.store.device(id).await?);
            }
            (rows, None)
        };
        rows.retain(|row| self.selection.labels.matches(&row.labels));
        let keys: Vec<DeviceKey> = rows.iter().map(|row| row.key).collect();
        let stored = self.store.stored_readings(&keys).await?;
        // Those of which nothing is stored are not even looked at.
        let with_stored = |row: DeviceRow| stored.get(&row.key).map(|&readings| (row, readings));
        Ok((rows.into_iter().filter_map(with_stored).collect(), next))
    }
}

/// What of a sensor's readings is behind a place.
fn behind(place: &Place, sensor: &SensorRow, readings: Series) -> Series {
    if sensor.name != place.sensor {
        return readings;
    }
    let begin = readings.times.partition_point(|&time| time <= place.time.micros());
    readings.slice(begin..readings.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros).expect("in range")
    }

    #[test]
    fn a_span_is_halved_until_nothing_is_left_to_halve_and_no_time_is_lost() {
        const DAY: i64 = 86_400_000_000;
        let whole = Span { start: Timestamp::MIN, end: None };
        for (reading, steps_max) in [(at(1_795_564_800_123_456), 25), (at(-3), 40), (Timestamp::MIN, 40)] {
            let (mut span, mut steps) = (whole, 0);
            while let Some((earlier, later)) = span.halves() {
                assert_eq!((earlier.start, earlier.end, later.end), (span.start, Some(later.start), span.end));
                assert!(earlier.start < later.start && later.end.is_none_or(|end| later.start < end));
                span = if reading < later.start { earlier } else { later };
                steps += u32::from(span.end.is_none_or(|end| end.micros() - span.start.micros() > DAY));
                let rest = whole.rest_from(span);
                assert_eq!(rest.last(), Some(&span), "halving leads to it again");
                assert!(rest.windows(2).all(|pair| pair[1].end == Some(pair[0].start)), "and all behind it is left: {rest:?}");
            }
            assert_eq!(span, Span { start: reading, end: Some(at(reading.micros() + 1)) });
            assert!(steps <= steps_max, "{steps} to come to a day");
        }
    }

    #[test]
    fn the_estimate_follows_from_what_is_behind() {
        let standing = Standing { devices: 1, devices_total: 4, stored: 100, stored_total: 400 };
        assert_eq!((standing.estimate(100), standing.estimate(10), standing.estimate(150)), (400, 40, 400));
        assert_eq!(Standing { stored: 0, ..standing }.estimate(7), 400);
    }
}
