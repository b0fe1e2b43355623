#!/bin/sh
# Draws the scenes that basalt-tiny learns from and is tested on:
#
#     sh recipes/basalt-tiny/scenes.sh train 48000 3 data/scenes
#     sh recipes/basalt-tiny/scenes.sh test 1000 7 data/scenes-test
#
# Emoji come from npm (@iconify-json/…), fonts from Debian's packages, which must be installed (see FONTS). The test has
# a vendor, fonts, layouts and words of its own.
set -eu
split=$1 count=$2 seed=$3 out=$4
work=${EMOJI:-var/emoji}

case $split in
train)
    EMOJI_SETS="noto openmoji fluent-emoji-flat emojione noto-v1 fluent-emoji fxemoji emojione-v1 streamline-emojis"
    FONTS="fonts-bebas-neue fonts-cantarell fonts-comfortaa fonts-croscore fonts-crosextra-caladea
        fonts-crosextra-carlito fonts-dejavu-core fonts-dejavu-extra fonts-dosis fonts-ebgaramond fonts-freefont-ttf
        fonts-gfs-didot fonts-inter fonts-lato fonts-league-spartan fonts-liberation fonts-linuxlibertine
        fonts-open-sans fonts-play fonts-quicksand fonts-roboto-unhinted fonts-sil-gentium fonts-urw-base35
        fonts-vollkorn"
    flag=""
    ;;
test)
    EMOJI_SETS="twemoji"
    FONTS="fonts-noto-core fonts-firacode fonts-cabin fonts-hack fonts-paratype"
    flag="--test"
    ;;
*)
    echo "scenes.sh: split must be train or test, not '$split'" >&2
    exit 1
    ;;
esac

set --
for name in $EMOJI_SETS; do
    if [ ! -d "$work/$name" ]; then
        mkdir -p "$work/$name"
        archive=$(cd "$work" && npm pack --silent "@iconify-json/$name")
        tar xzf "$work/$archive" -C "$work/$name" --strip-components=1
    fi
    set -- "$@" --emoji "$work/$name"
done
# No hairlines, no fonts of symbols. Of Noto, which has a font for every script, and of the others of the test: one bold
# and one plain cut.
unfit='Thin|Hairline|Light|Keyboard|_K|_I\.|_aS|_M|_DR|BI\.|D050000L|Symbols|Z003|Math|Slanted|SC[0-9]|Initials'
tested='/(NotoSans|NotoSerif|FiraCode|Cabin|Hack)-Bold\.|/NotoSans-Regular\.|/PTS75F\.'
for file in $(dpkg -L $FONTS | grep -E '\.(otf|ttf)$' | grep -vE "$unfit" | sort); do
    if [ "$split" = train ] || echo "$file" | grep -qE "$tested"; then
        set -- "$@" --fonts "$file"
    fi
done
exec basalt data make-scenes "$@" --count "$count" --seed "$seed" $flag --out "$out"
