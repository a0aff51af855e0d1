"""The verifier's rules as tables: by topic, gold answers, the answers that are right and those that are wrong."""
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import verifier
from verifier import extract_boxed, main, verify

HUGE = ["10^{400}", "1e999", "9" * 400, "2^{2000}"]
# topic -> [(gold, [right answers], [wrong answers])]; answers are contents of a box
TABLE: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "gold spelling": [
        ("$17$", ["17"], ["71"]),
        (r"\boxed{17}", ["17"], ["1"]),
        (r"$\boxed{\frac{3}{8}}$", [r"\frac38"], [r"\frac83"]),
        ("  17. ", ["17", " 17 ", "17.", "$17$", r"\(17\)", "\n17\n", "\t17"], ["17..5"]),
        (r"$4$,$9$", ["4, 9", "9,4"], ["49", "4.9"]),
        ("", [], ["0", "x", "{}", r"\,", r"\text{}"]),
        (r"\frac{1}{", [], ["1", "{"]),
    ],
    "integers": [
        ("7654321", ["7,654,321", "7{,}654{,}321", r"7,\!654,\!321", r"7\,654\,321", "7 654 321", "7654321.0",
         "+7654321", "07654321", r"\$7,654,321", r"7\ 654\ 321", r"7\;654\;321"], ["7654320", "7,654,32", "76,54,321",
         "7,65,4321", "7.654321", "7, 654, 321", "-7654321", "7654321.5", "7 65 4321"]),
        ("32349", ["32,349", "32{,}349", "32 349"], ["32, 349", "32; 349", "(32,349)", "3 2349", "32.349", "323 49"]),
        ("-8", ["−8", "- 8", "(-8)", "{-8}", "-8.0", "-08", r"-\frac{16}{2}"], ["8", "--8", "-8-", "8-", "+8", "- -8",
         "-+8", "–-8"]),
        ("12", ["12", "{12}", "(12)", r"\mathbf{12}", r"\text{12}"], ["1 2", "1,2", "1{}2", r"1\cdot 2", "1*2", "21",
         "1.2", "{1}{2}", "12-"]),
        ("100000000000000000000000", ["1" + "0" * 23, r"10^{23}"], ["1" + "0" * 22 + "1", "9" * 23]),
        ("9007199254740993", ["9,007,199,254,740,993"], ["9007199254740992", "9007199254740994",
         "9.007199254740993e14"]),
        ("7" * 5_000, ["7" * 5_000], ["7" * 4_999 + "8"]),
        ("007", ["7", "07", "7.00"], ["70", "0.07"]),
        ("0", ["0", "0.0", "-0", "00"], ["1e-400", "o", r"e^{-800}", r"e^{-40}", "()", "0.01"]),
    ],
    "rationals": [
        (r"\frac{5}{8}", [r"\frac58", r"\dfrac58", r"\tfrac{5}{8}", "5/8", "0.625", ".625", r"\frac{10}{16}",
         r"\frac{-5}{-8}", "10/16", r"\frac 58", r"\frac5{8}", r"\left(\frac58\right)", "+5/8", r"62.5\%"], ["58",
         "8/5", "5.8", "5,8", "5:8", r"-\frac58", r"\frac{5}{80}", "0.62", "0.6250001", r"\frac{5}{}", r"\frac{}{8}",
         "5/", "/8"]),
        (r"-\frac{9}{4}", [r"\frac{-9}{4}", r"\frac{9}{-4}", "-9/4", "-2.25", r"-2\frac14", "-2 1/4", r"-2\dfrac{1}{4}",
         r"-2\ \frac14"], [r"2\frac14", "-21/4", r"-\frac49", r"-2\frac13", r"-2-\frac14", r"-\frac74"]),
        (r"5\frac{2}{3}", [r"\frac{17}{3}", "17/3", "5 2/3", r"5\tfrac23"], ["52/3", r"5\cdot\frac23", r"\frac{10}{3}",
         "5", "5.67", r"5\frac32"]),
        ("4", ["8/2", r"\frac{12}{3}", "4.00", r"\sqrt{16}", "2^2"], ["2+2", "3+1", "5-1", "1+1+1+1", r"\frac{3+5}{2}",
         "2 2", r"4\frac13"]),
        ("1/3", [r"\frac13", "2/6", r"\frac{1/2}{3/2}"], ["0.33", "0.333333", ".3", "3", "33/100"]),
        (r"\frac{2469}{2}", [r"1234\frac12", r"1,234\frac12", "1234.5"], ["617", r"617\frac12"]),
        ("617", [], [r"1,234\frac12", r"1234\frac12", "1234 1/2"]),
        ("-3./4", ["-3/4", "-0.75"], ["3/4", "-3.4"]),
        (r"\frac{7}{6}", [r"1\frac16"], [r"\frac12+\frac23", "1/2+2/3", "1.17"]),
    ],
    "decimals": [
        (r"\frac{1}{7}", ["0.142857142857", "0.1428571428571428", "0.142857142857142857142857"], ["0.142857",
         "0.14285714", "0.142857143857", "0.14"]),
        (r"\frac{8}{3}", ["2.6666666666667", "2.666666666666"], ["2.6667", "2.67", "2.6666"]),
        ("0.264", ["0.264", ".2640", r"\frac{33}{125}"], ["0.265", "0.26", "0.2641", "0,264", "264"]),
        (r"\pi", ["3.14159265358979", "3.141592653589793238462643", "3.141592654"], ["3.14", "3.1416", "22/7", "3",
         "3.14159265", "3.141592658"]),
        (r"10000\sqrt{10}", ["31622.776601683793"], ["31622.7766", "31622.78", "31622"]),
        ("0.7453559924999299", [r"\frac{\sqrt5}{3}"], [r"\frac{\sqrt3}{5}"]),
        ("5", ["5.000000000000"], ["4.9999999999", "5.0000000001", "4.9999"]),
        ("3.5", ["7/2", "3.50"], ["3,5", "35", "3.5.0", "3.49999999999999"]),
    ],
    "percent": [
        (r"35\%", ["35", r"35\%", "35%", r"35\text{ percent}", "35 percent", "0.35", r"\frac{7}{20}", r"35 \%"],
         ["3500", "3.5", "0.36", r"350\%", "0.0035"]),
        ("35", [r"35\%", "35 pct"], ["0.35", "3500", r"3500.5\%"]),
        ("0.35", [r"35\%", "0.35"], ["35", r"3.5\%"]),
        (r"\frac12", [r"50\%"], [r"5\%", "50"]),
        (r"12.5\%", ["12.5", "1/8", r"\frac18"], ["12", r"8\%"]),
    ],
    "degrees, units, money": [
        ("45", [r"45^\circ", r"45^{\circ}", "45°", r"45\text{ degrees}", "45 degrees", r"45\,\mathrm{cm}",
         r"45\text{ cm}^2", "45 cm", "45 cm^2", "45 square units", r"45\text{ square feet}", r"45\,\mathrm{m/s}",
         r"45\,\text{km}/\text{h}", r"\$45", r"\$45.00", "45 dollars", r"45\mbox{ inches}", r"45\ \text{m}",
         r"45\text{ edges}", r"45\,\mathrm{m\,s^{-1}}", "45 meters per second"], [r"4.5^\circ", r"45\text{ or }46",
         r"45\text{ and }45", r"45\text{ or less}", r"\text{not }45", r"45\text{ not}", r"45\text{ million}",
         r"45\text{ millions}", r"45\text{ fifths}", r"45\text{ thousand}", r"45\text{ hundredths}",
         r"45\text{ dozen}", r"45\text{ mod }50", r"45x", r"45m", "45 apples", r"\text{about }45", r"45\text{ or so}",
         r"\$0.45"]),
        (r"6\text{ cm}", ["6", r"6\,\mathrm{cm}", "6 cm", r"6\text{ centimeters}", r"6\text{cm}"], [r"6\text{ m}",
         r"6\text{ mm}", r"6\text{ cm}^2", "6 inches", r"\text{ cm }6", r"6\text{ hours}"]),
        (r"30\mbox{ inches}^2", ["30", r"30\text{ in}^2", r"30\text{ square inches}", r"30\text{ sq in}",
         r"30\text{ square units}"], [r"30\text{ inches}", r"30\text{ cm}^2"]),
        (r"90\text{ miles per hour}", [r"90\text{ mph}", r"90\text{ mi/h}", "90"], [r"90\text{ km/h}",
         r"90\text{ miles}"]),
        ("12", [r"\text{12 cm}", r"\text{12 square feet}", r"12~\mathrm{cm}", r"12\ \mathrm{~cm}", r"12\text{ times}"],
         [r"\text{12 or 13}", r"\text{12 feet 3 inches}", r"\text{1 in 12}", r"\text{12 thousand}", r"1\text{2 cm}"]),
        ("90^\\circ", ["90"], ["90^\\circ*", "90^\\circ/", "90%/"]),
        (r"60^\circ", ["60", r"60\text{ degrees}", "60°"], [r"\frac{\pi}{3}", r"60\text{ radians}", r"60'"]),
        (r"\pi", [r"\pi\text{ radians}", r"\pi"], [r"180^\circ", "180"]),
        (r"\$27.40", ["27.40", "27.4", r"\$27.4", r"27.40\text{ dollars}", r"\$ 27.40"], ["2740", r"27.40\text{ cents}",
         r"\$27"]),
        (r"1300^\circ C", ["1300", r"1300^\circ\text{C}"], [r"1300^\circ F"]),
        (r"5\text{ steps left}", [r"5\text{ steps left}", "5"], [r"5\text{ steps right}"]),
        (r"\frac{2}{5}\pi\text{ feet}", [r"\frac{2\pi}{5}", r"0.4\pi"], [r"\frac25"]),
        (r"6\sqrt5\text{ square yards}", [r"6\sqrt{5}", r"\sqrt{180}"], [r"6\sqrt{7}"]),
    ],
    "scientific notation": [
        ("4.2e9", [r"4.2\times10^{9}", r"4.2\cdot10^9", "4.2E+9", "4.2e9", "4.2 * 10^9", "4200000000", "4,200,000,000",
         r"42\times10^8", r"4.2 \times 10^(9)"], [r"4.2\times10^{8}", "4.2", "4.2e-9", r"4.2\times10", "42e9",
         r"4.2^9"]),
        ("2.5e-3", ["0.0025", r"2.5\times10^{-3}", r"\frac{1}{400}", r"2.5 \times 10^-3"], [r"2.5\times10^{3}", "0.025",
         "2.5"]),
        ("1e-2", ["10^{-2}", "0.01", r"1\times10^{-2}"], ["10^2", "0.1", "1e2"]),
        ("1e999", ["1e999"], ["1e1000", "1e998", r"\infty", "inf", "nan"]),
        ("1e99999999", ["1e99999999"], ["1e99999998", "0", r"\infty"]),
        ("6", [], ["nan", "inf", "-inf", "NaN", "1e999999999", r"\infty", r"\frac{0}{0}", r"\frac60"]),
        (r"6.02\times 10^{23}", ["6.02e23", "602" + "0" * 21], ["6.022e23", "6.02e22"]),
    ],
    "closed forms": [
        (r"3\sqrt{5}", [r"3\sqrt5", r"\sqrt{45}", r"3 \sqrt{5}", r"3\cdot\sqrt{5}", r"3*\sqrt5", r"\frac{15}{\sqrt5}",
         "3√5", "3sqrt(5)"], [r"\sqrt{5}", r"-3\sqrt5", r"3\sqrt{6}", r"\sqrt{15}", r"3+\sqrt5", "35", r"\sqrt[3]{5}",
         r"3^{\sqrt5}"]),
        (r"\frac{\sqrt6}{3}", [r"\frac{2}{\sqrt6}", r"\sqrt{\frac23}", r"\frac{\sqrt{6}}3", r"\frac13\sqrt6"],
         [r"\frac{\sqrt3}{6}", "0.816"]),
        (r"\frac{3\pi}{4}", [r"3\pi/4", r"\frac34\pi", r"0.75\pi", r"\frac{3}{4}\pi", r"\pi\cdot\frac{3}{4}", "3π/4"],
         [r"\frac{4\pi}{3}", r"\frac34", r"135", r"\frac{3}{4\pi}"]),
        ("1024", ["2^{10}", "2^10", "4^5", r"32^2", r"2^{5}\cdot 2^5"], ["210", "2^9", "2^{11}", "2^{1}0"]),
        ("120", ["5!", r"\binom{10}{3}", r"\dbinom{10}{7}", r"5\cdot4!"], ["4!", r"\binom{10}{4}", "5"]),
        (r"2^{1000000}", [r"2^{1000000}", "2^{1000000}"], ["2^{1000001}", "0", r"4^{500000}"]),
        (r"3000!", ["3000!"], ["3001!", "0"]),
        (r"\frac{50!}{2^{20}}", [r"\frac{50!}{2^{20}}", r"\frac{50!}{1048576}"], [r"\frac{50!}{2^{21}}", "0"]),
        ("3", [r"\sqrt[3]{27}", r"27^{1/3}", r"\sqrt9", r"\frac{6}{2}"], [r"\sqrt[3]{28}", r"3.0000000001"]),
        ("-2", [r"\sqrt[3]{-8}"], [r"\sqrt[3]{8}", r"\sqrt{4}"]),
        (r"2^6 3^5", ["2^6 * 3^5", r"2^6\cdot 3^5", "15552"], ["2^{63} 5", "2^5 3^6", "64 243"]),
        (r"\frac{-1+\sqrt5}{2}", [r"\frac{\sqrt5-1}{2}", r"\frac{\sqrt{5}}{2}-\frac12", "0.6180339887498949"],
         [r"\frac{1+\sqrt5}{2}", "0.618"]),
        ("2-5i", ["2 - 5i", "-5i+2", r"2-5\mathrm{i}"], ["2+5i", "5-2i", "-3", "2-5", "2-5j", "7"]),
        (r"e^2", ["e^{2}", r"e\cdot e", r"\mathrm{e}^2"], ["e", "2e", "7.389", "e^{-2}"]),
        (r"\ln 2", [r"\ln(2)", r"\ln{2}", r"\frac12\ln 4"], [r"\ln 3", "0.693", r"\log_{10} 2", r"2\ln 2"]),
        (r"\log_2 6", [r"\frac{\ln6}{\ln2}", r"\log_{2}(6)", r"1+\log_2 3"], [r"\log_6 2", r"\log 6"]),
        (r"\frac{5^4-3^4}{2^3}", ["68", r"\frac{544}{8}"], ["67"]),
        (r"\frac{1+\sqrt{7}}{4} \approx 0.911", [r"\frac{1+\sqrt7}{4}"], ["0.911", r"\frac{1+\sqrt7}{2}"]),
    ],
    "numbers beyond doubles": [(r"\sqrt{5}", [], HUGE), *((huge, [], [r"\sqrt{5}"]) for huge in HUGE)],
    "tuples, intervals": [
        ("(3,-4)", ["(3, -4)", r"\left(3,-4\right)", "( 3 , -4 )", "(x,y)=(3,-4)", "(3.0,-8/2)", r"\bigl(3,-4\bigr)",
         r"(a,b) = (3,-4)"], ["(-4,3)", "3,-4", "[3,-4]", r"\{3,-4\}", "(3,-4,0)", "(3)", "3", "(3,4)", "(3,-4",
         "3,-4)", "(3,-4]", r"\langle3,-4\rangle", "34", "-12"]),
        ("[0,2)", [r"\left[0,2\right)", "[0, 2)", r"x\in[0,2)", r"[0,\sqrt4)"], ["(0,2)", "[0,2]", "(0,2]", "[2,0)",
         r"0\le x<2", "[0,3)"]),
        (r"(-\infty,4]", [r"(-∞, 4]", r"\left(-\infty,4\right]"], [r"(\infty,4]", r"(-\infty,4)", r"x\le4",
         r"[4,\infty)"]),
        (r"(1,+\infty)", [r"(1,\infty)", r"(1, + \infty)", r"y \in (1, \infty)"], [r"[1,\infty)", r"(1,-\infty)",
         r"x>1"]),
        (r"\infty", [r"+\infty", "∞"], [r"-\infty", "0", "8"]),
        ("(100,200)", ["(100, 200)"], ["100200", "100,200", "(100200)"]),
        ("(45^\\circ, 60^\\circ)", ["(45,60)", "(45°, 60°)"], ["(60,45)", r"(\frac{\pi}{4},\frac{\pi}{3})"]),
        ("((1,2),3)", ["((1, 2), 3)"], ["(1,2,3)", "(1,(2,3))"]),
    ],
    "lists, sets": [
        ("2,-5", ["-5, 2", "2;-5", r"2\text{ and }-5", "-5 and 2", r"-5\text{ or }2", "2 or -5", r"\{2,-5\}",
         r"\left\{-5, 2\right\}", "x=2,-5", "x=2, x=-5", "a = -5, b = 2", "2, and -5", r"\frac{4}{2}, -5.0",
         r"x_1 = 2, x_2 = -5"], ["2", "-5", "2,-5,0", "2,5", "2,-5,-5", "(2,-5)", "[2,-5]", "2-5", "-3", "2,2",
         r"\{2\}", "2,,-5", "25"]),
        (r"\{1,2,3\}", ["3,2,1", "1, 2, and 3", r"\{2, 1, 3\}", "{1,2,3}"], ["(1,2,3)", "1,2", "123", "1,2,3,4,5",
         "1,2,2,3", "{3}", r"\{1,2,4\}", "[1,2,3]"]),
        ("5", [r"\{5\}", "x=5", "(5)"], ["1,2,3,4,5", "5,6", r"5\text{ or }6", "5,5", "(5,5)", "4,5"]),
        (r"\pm 4", ["4,-4", "-4, 4", r"\pm4", r"x=\pm 4", r"\{-4,4\}", r"\{\pm4\}", "±4"], ["4", "-4", "4,4", r"\pm 5",
         "0", r"\mp 5"]),
        (r"2\pm\sqrt3", [r"2+\sqrt3, 2-\sqrt3", r"2-\sqrt{3},2+\sqrt{3}", r"\{2\pm\sqrt{3}\}"], [r"2+\sqrt3",
         r"2\pm\sqrt5", r"-2\pm\sqrt3", "2"]),
        ("(1,2),(3,4)", ["(3,4),(1,2)", r"\{(1,2),(3,4)\}", r"(1,2)\text{ and }(3,4)", "(3,4) or (1,2)",
         "(x,y)=(1,2),(3,4)"], ["(1,2)", "(1,2),(4,3)", "(2,1),(4,3)", "1,2,3,4", "((1,2),(3,4))", "(1,2,3,4)"]),
        ("a=1, b=2", ["b=2, a=1", "1,2", "a=1,b=2"], ["a=2, b=1", "a=1", "a=1,b=3"]),
        (r"27^\circ, 63^\circ", ["63, 27", r"27^\circ\text{ and }63^\circ"], ["27", r"27^\circ, 64^\circ"]),
        ("1 and 2 and 3", ["1,2,3"], ["1,3", "6"]),
        (r"f(x)=x, f(x)=-x", [r"f(x)=-x\text{ or }f(x)=x", "x, -x"], ["f(x)=x", "f(x)=x,f(x)=-2x"]),
        ("1,1,2", ["2,1,1", "1, 1.0, 4/2", "2/2,1,2"], ["1,2,2", "1,2/2,2/2", "1.0,2.0,2", "1,2"]),
        (r"\emptyset", [r"\varnothing", "∅"], ["0", r"\{0\}", "none"]),
    ],
    "unions": [
        (r"(-\infty,1)\cup(4,\infty)", [r"(4,\infty)\cup(-\infty,1)", "(-∞,1)∪(4,∞)",
         r"x\in(-\infty,1)\cup(4,+\infty)"], [r"(-\infty,1)", r"(-\infty,1)\cap(4,\infty)",
         r"(-\infty,1]\cup(4,\infty)", r"(-\infty,1),(4,\infty)", r"(-\infty,1)\cup(5,\infty)", r"(-\infty,\infty)",
         r"(-\infty,1)\cup(4,\infty)\cup(2,3)"]),
        (r"(-\infty,0)\cup\{1\}", [r"\{1\}\cup(-\infty,0)"], [r"(-\infty,0)\cup(1)\cup", r"(-\infty,0)\cup\{2\}",
         r"(-\infty,1)"]),
    ],
    "matrices": [
        (r"\begin{pmatrix} 1 & 0 \\ 2 & 5 \end{pmatrix}", [r"\begin{bmatrix}1&0\\2&5\end{bmatrix}",
         r"\left[\begin{array}{cc} 1 & 0 \\ 2 & 5 \end{array}\right]",
         r"\begin{pmatrix} 1 & 0 \\ 2 & 5 \\ \end{pmatrix}", r"\begin{pmatrix}1.0&0\\ \frac{4}{2}&5\end{pmatrix}",
         r"A=\begin{pmatrix}1&0\\2&5\end{pmatrix}"], [r"\begin{pmatrix}1&2\\0&5\end{pmatrix}", "1,0,2,5",
         r"\begin{pmatrix}1&0&2&5\end{pmatrix}", r"\begin{pmatrix}1\\0\\2\\5\end{pmatrix}",
         r"\begin{vmatrix}1&0\\2&5\end{vmatrix}", r"\begin{pmatrix}1&0\\2&6\end{pmatrix}",
         r"\begin{pmatrix}1&0\\25\end{pmatrix}", "5"]),
        (r"\begin{pmatrix} 1/2 \\ -3 \end{pmatrix}", [r"\begin{pmatrix} 0.5 \\ -3 \end{pmatrix}",
         r"\begin{bmatrix}\frac12\\-3\end{bmatrix}"], [r"\begin{pmatrix} 1/2 & -3 \end{pmatrix}", "(1/2,-3)"]),
    ],
    "text, choice": [
        (r"\text{Tuesday}", ["Tuesday", "tuesday", r"\textbf{Tuesday}", r"\mathrm{Tuesday}", r"\text{ Tuesday }",
         r"\text{TUESDAY}"], ["Tue", "Tues", "day", "Thursday", r"\text{Tuesday or Friday}", r"\text{not Tuesday}"]),
        ("(C)", ["C", r"\text{(C)}", r"\text{C}", r"\mathrm{C}", r"\textbf{(C)}", "(C)", "C."], ["A", "CD", "C,D",
         "ABC", r"C\text{ or }D", "3", "(D)"]),
        ("B", ["(B)", r"\textbf{B}"], ["b+0", "BB", "AB", "8"]),
        ("no", ["No", "NO", r"\text{no}"], ["on", "yes", "not", "n"]),
        ("True", ["true", r"\text{True}"], ["False", "t", "1"]),
        (r"\text{New York}", ["new york", r"\text{New  York}"], ["York", "newark"]),
        ("odd", [r"\text{odd}"], ["dod", "oddd", "even", "o"]),
    ],
    "base, ratio, time": [
        ("342_7", ["342_{7}", r"342_7", r"342_{ 7 }"], ["342", "3427", "342_8", "177", "343_7"]),
        ("5:3", ["5:3", "5 : 3", "$5:3$"], ["3:5", "5/3", "53", r"\frac53", "5:4", "10:3"]),
        (r"4:30\text{ p.m.}", [r"\text{4:30 p.m.}", r"4:30\text{ pm}", "4:30 PM", r"4:30\,\text{p.m.}"],
         [r"4:30\text{ a.m.}", "4:30am", "4:31 pm", "16:31", "5:30 pm", "430"]),
        ("12:45", ["12:45"], ["12", "12.45", "45:12", "1245"]),
    ],
    "algebra": [
        ("x^2+4x+3", ["x^{2}+4x+3", "x^2 + 4 x + 3", r"x^2+4\cdot x+3", "x^2+4*x+3", "3+4x+x^2", "(x+1)(x+3)",
         "y=x^2+4x+3", "f(x) = x^2+4x+3"], ["x^2+4x-3", "x^2+4x", "x2+4x+3", "y^2+4y+3", "x^{22}+4x+3", "8", "x^2+3x+4",
         "-(x^2+4x+3)", "x^2+4x+3=0", "x^2+4x+3+c", "x^2+4X+3"]),
        ("y = 3x - 1", ["3x-1", "y=3x-1", "f(x)=3x-1", "y = -1 + 3x"], ["3x-y=1", "2y=6x-2", "3x+1", "z=3x-1", "y=3x",
         "3x", "x=3y-1", "y>3x-1"]),
        ("x=9", ["9", "x = 9", r"x=\sqrt{81}", r"\{9\}"], ["x=-9", "y=9", "x>9", "9=x+0", "x+9", "x^2=81"]),
        ("9", ["x=9", "n = 9", r"m_{\max}=9", "x=y=9", r"\alpha = 9", "k=18/2"], ["x=8", "9=x+1", "x+y=9", "2x=9",
         "x-9=0", "x+1=9", "9x", r"\ge 9", "x<9", r"x\ne9", "f(x)+9"]),
        ("2a + 3b = 7", ["2a+3b=7", "3b+2a=7", r"2a+3b=\frac{14}{2}"], ["2a+3b-7=0", "4a+6b=14", "7", "2a+3b",
         "3a+2b=7", "2a+3b=8", "2a+3b=-7"]),
        (r"x \leq 3", [r"x\le3", "x <= 3", "x ≤ 3", r"x\leqslant 3"], ["x<3", r"x\ge3", "3", "x=3", r"(-\infty,3]"]),
        (r"x\neq 2", ["x != 2", r"x \ne 2"], ["x=2", "2"]),
        (r"\frac{n(n+1)}{2}", [r"\frac{n^2+n}{2}", "n(n+1)/2", r"\frac12 n(n+1)", r"\frac{1}{2}n^2+\frac{n}{2}"],
         [r"\frac{n(n-1)}{2}", "n(n+1)", "n"]),
        (r"\frac{2\pi}{\omega}", [r"2\pi/\omega", r"2\pi\omega^{-1}"], [r"2\pi\omega", r"\frac{\omega}{2\pi}"]),
        (r"\sin^2 x", [r"\sin^{2}(x)", r"1-\cos^2 x", r"(\sin x)^2"], [r"\sin x^2", r"\cos^2x", r"\sin x"]),
        (r"c e^{-2 t}", ["ce^{-2t}", r"\frac{c}{e^{2t}}", r"c\cdot e^{-2t}"], ["ce^{2t}", "c", "e^{-2t}"]),
        ("v_0^2/g", [r"\frac{v_0^2}{g}", "v^2_0/g", r"\frac{v_{0}^{2}}{g}"], [r"\frac{v_1^2}{g}", r"\frac{v_0}{g}",
         r"\frac{v^2}{g}"]),
        ("f(n)=n", ["f(n) = n", "n", "y=n"], ["f(y)=n", "g(n)=n", "f(n)=2n", "f(n)=m"]),
        ("I(0)", ["I(0)"], ["2I(0)", "0", "I", "I(1)"]),
        ("p-q", ["p - q", "-q+p"], ["q-p", "p+q", "p"]),
        ("MR=MC", ["MR = MC"], ["MR=AC", "MC"]),
        (r"\lfloor x\rfloor", [r"\left\lfloor x \right\rfloor"], ["x", r"\lceil x\rceil"]),
        (r"\int_0^1 x\,dx", [r"\int_{0}^{1} x \, dx"], [r"\frac12", r"\int_0^2 x\,dx"]),
    ],
    "no answer at all": [
        (gold, [], ["?", "...", r"\ldots", r"\text{answer}", r"\forall", "None", "True", "()", ",", ";", "=", "-",
         "/", "%", "$", "[]", r"\{\}", r"\frac{}{}", r"\sqrt{}", r"\text{same as the gold}", r"\pm", "^", "_", "*",
         "%s", "gold", "{}", r"\1", "\x00", "\ud800"])
        for gold in ("5", r"\frac12", "(1,2)", "x+1", r"\text{Tuesday}")
    ],
}  # fmt: skip
ROWS = [(topic, gold, answer, right) for topic, lines in TABLE.items() for gold, good, bad in lines
        for right, answers in ((True, good), (False, bad)) for answer in answers]  # fmt: skip


def box(answer: str) -> str:
    return rf"Adding up, we get $\boxed{{{answer}}}$."


@pytest.mark.parametrize("topic", TABLE)
def test_rules(topic):
    wrong = [row for row in ROWS if row[0] == topic and verify(box(row[2]), row[1]) is not row[3]]
    assert not wrong, "\n".join(f"gold {gold!r:.99}, answer {answer!r:.99}: should be {right}" for _, gold, answer,
        right in wrong)


BOXES = [  # response, what the box holds
    (r"First \boxed{3}, no: \boxed{4}.", "4"), (r"\boxed{5}\boxed{6}", "6"), (r"\fbox{7}", "7"),
    (r"\boxed{1} \fbox{2}", "2"), (r"\fbox{1} \boxed{2}", "2"), (r"\boxed{\boxed{8}}", "8"),
    (r"\boxed{\text{so }\fbox{9}}", "9"), (r"\boxed {10}", "10"), ("\\boxed{\n 11 \n}", "11"), (r"$\boxed 12$", "12"),
    (r"\(\boxed 5\)", "5"), (r"\boxed\frac12$", r"\frac12"), (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\{1,2}", r"\{1,2"), (r"\boxed{a\}b}", r"a\}b"),
    (r"}}}\boxed{13}{{{", "13"), (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
    (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"), (r"<think>\boxed{1}</think> it is 1", None),
    (r"<think>first \boxed{1}", "1"), (r"\boxed{1} and then \boxed{", None),
    (r"\boxed{1} and then \boxed{\frac{1}{2}", None), (r"\boxed{1} and then \boxed{}", None), (r"\boxed{ }", None),
    (r"\boxed", None), (r"\boxedx{5}", None), (r"\boxed}", None), ("boxed{5}", None), ("Answer: 5", None),
    ("The answer is $5$.", None), ("", None),
]


@pytest.mark.parametrize(("response", "content"), BOXES)
def test_the_last_box_is_the_answer(response, content):
    assert extract_boxed(response) == content
    assert verify(response, content or "5") is (content is not None)
    assert verify(response, "unrelated") is False


@pytest.mark.parametrize("pair", [(None, "5"), (r"\boxed{5}", None), (None, None), (5, 5), (b"\\boxed{5}", "5"),
                                  ("", ""), (r"\boxed{}", "")])
def test_what_is_not_an_answer_is_wrong(pair):
    assert verify(*pair) is False


HOSTILE = {
    "braces": "\\boxed{" + "{" * 100_000 + "5" + "}" * 100_000 + "}",
    "open braces": "\\boxed{" + "{" * 100_000,
    "parentheses": "\\boxed{" + "(" * 400 + "5" + ")" * 400 + "}",
    "roots": "\\boxed{" + "\\sqrt" * 190 + "5}",
    "fractions": "\\boxed{" + "\\frac1{" * 140 + "5" + "}" * 140 + "}",
    "functions": "\\boxed{" + "\\sin" * 240 + " x}",
    "exponents": "\\boxed{" + "2^{" * 300 + "2" + "}" * 300 + "}",
    "tower": r"\boxed{9^{9^{9^9}}}",
    "power": r"\boxed{10^{100000}}",
    "powers": r"\boxed{((((9^{999})^{999})^{999})^{999})}",
    "factorials": r"\boxed{((1000!)!)!}",
    "compound interest": r"\boxed{(1+10^{-9})^{10^{18}}}",
    "digits": "\\boxed{" + "7" * 100_000 + "}",
    "many digits": "\\boxed{" + "7" * 5_000 + "}",
    "exponent": r"\boxed{1e9999999999999999999}",
    "dollars": "$" * 1_000_000,
    "boxes": r"\boxed{" * 150_000,
    "closed boxes": r"\boxed{" * 50_000 + "5" + "}" * 50_000,
    "thinks": "</think>" * 100_000 + r"\boxed{6}",
    "sum": "\\boxed{" + "1+" * 495 + "1}",
    "fraction sum": "\\boxed{" + "1/7^{99}+" * 100 + "1}",
    "list": "\\boxed{" + "1," * 495 + "1}",
    "unit words": "\\boxed{5 " + "cm " * 320 + "x}",
    "degrees": "\\boxed{5" + "\\degree " * 100 + "x}",
    "percent signs": "\\boxed{5" + "%" * 900 + "x}",
    "texts": "\\boxed{" + "\\text{" * 3_000 + "}" * 3_000 + "}",
    "signs": "\\boxed{" + "\\pm 1" * 190 + "}",
    "labels": "\\boxed{" + "x=" * 490 + "6}",
    "unions": "\\boxed{" + "(1,2)\\cup" * 100 + "(1,2)}",
    "matrices": "\\boxed{" + r"\begin{pmatrix}" * 60 + "}",
    "nulls": "\\boxed{" + "\x00" * 900 + "}",
    "surrogates": "\\boxed{" + "\ud800" * 900 + "}",
    "combining": "\\boxed{" + "\u0301" * 19_000 + "}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused_at_once(name):
    start = time.monotonic()
    for gold in ("5", r"\frac{\pi}{2}", "(1,2)", r"\{1,2\}", "x+1", HOSTILE[name][7:-1]):
        assert verify(HOSTILE[name], gold) in (True, False)
    assert not verify(HOSTILE[name], "5") or name in ("closed boxes", "braces")
    assert verify(r"\boxed{5}", HOSTILE[name]) is False or name in ("closed boxes", "braces")
    assert time.monotonic() - start < 2  # a hang, not a benchmark


def test_the_same_verdicts_from_threads(capfd):
    with ThreadPoolExecutor(4) as threads:
        verdicts = [list(threads.map(lambda row: verify(box(row[2]), row[1]), ROWS)) for _ in range(4)]
    assert verdicts == [[right for *_, right in ROWS]] * 4
    assert capfd.readouterr() == ("", "")


def test_command_line(capsys):
    assert main(["--gold", "1/2", r"text with \boxed{\frac12}"]) == 0
    assert capsys.readouterr().out.startswith(r"right  box: \frac12")
    assert main(["--gold", "1/2", r"text with \boxed{2}"]) == main(["--gold", "1/2", "text without"]) == 1
    assert "box: None" in capsys.readouterr().out
    for argv in ([], ["text"], ["--gold", "1"], ["text", "--gold", "1", "--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_as_a_script():
    done = subprocess.run([sys.executable, verifier.__file__, "--gold", "1/2", r"so \boxed{0.5}"], capture_output=True,
                          text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right  box: 0.5  gold: 1/2\n", "")
