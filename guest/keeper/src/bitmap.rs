//! A set of page numbers: one bit a page, so a tebibyte of memory costs 32 MiB and an ordinary machine a few KiB.

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    pages: usize,
}

impl Bitmap {
    /// The empty set over `pages` pages.
    pub fn new(pages: usize) -> Bitmap {
        Bitmap {
            words: vec![0; pages.div_ceil(64)],
            pages,
        }
    }

    /// Add `count` pages from `first` on; what lies beyond the end is ignored.
    pub fn add(&mut self, first: usize, count: usize) {
        let end = first.saturating_add(count).min(self.pages);
        let mut page = first;
        while page < end {
            let (word, bit) = (page / 64, page % 64);
            let here = (64 - bit).min(end - page);
            self.words[word] |= (u64::MAX >> (64 - here)) << bit;
            page += here;
        }
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// All members, ascending.
    pub fn members(&self) -> Vec<u32> {
        let mut out = Vec::with_capacity(self.words.iter().map(|w| w.count_ones() as usize).sum());
        for (at, &word) in self.words.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                out.push((at * 64) as u32 + left.trailing_zeros());
                left &= left - 1;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_what_was_added() {
        let mut set = Bitmap::new(200);
        set.add(3, 1);
        set.add(60, 70);
        set.add(199, 50);
        set.add(500, 2);
        let expect: Vec<u32> = [3].into_iter().chain(60..130).chain([199]).collect();
        assert_eq!(set.members(), expect);
        set.clear();
        assert_eq!(set, Bitmap::new(200));
    }

    #[test]
    fn a_run_may_fill_whole_words() {
        let mut set = Bitmap::new(256);
        set.add(0, 256);
        assert_eq!(set.members().len(), 256);
    }
}
